"""Look at data as a model will see it, before anything is trained: ``lit-lora data``, and :func:`inspect_data`.

Rows go through the functions that training uses, a batch at a time, and only counts are kept of them, so that any
number of them takes a few bytes each. Nothing is cut on the way, to tell what each ``max_length`` would cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lit_lora.base.load import load_config, load_tokenizer
from lit_lora.data.batches.mixture import Mixture
from lit_lora.data.chats.formats import Layout, layout_of, parse_examples
from lit_lora.data.chats.pairs import CHOSEN, PAIRS, REJECTED, is_pair, refusal, split
from lit_lora.data.chats.tokenize import Encoded, encode_examples
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.data.look.pair_inspection import EncodedPair, encode_pairs
from lit_lora.data.look.pieces import Piece, pieces_of
from lit_lora.data.look.problem_kinds import ProblemKinds
from lit_lora.data.look.report import DataReport
from lit_lora.data.look.report_parts import Bin, Cut, Lengths, LookedAt, PairCounts, ShownExample, Suggested
from lit_lora.data.look.suggestion import suggest
from lit_lora.data.prepared.prepare import SourceSettings
from lit_lora.data.rows.data_source import DataSource, described, sources_of
from lit_lora.data.rows.readers import rows_of
from lit_lora.data.rows.rows import Problems, Row
from lit_lora.data.rows.sources import read_blocks
from lit_lora.data.source_data import SourceData
from lit_lora.wording import advice

DEFAULT_ROWS = 10_000
NO_LIMIT = 2**40
"""Tokens that no example has."""

_MOST_PROBLEMS = 10_000
"""Of a block of rows that are told apart."""
_MAX_LENGTHS = tuple(2**power for power in range(6, 21))
"""That the report compares; those of them that matter are shown."""
_MOST_BINS = 14


def inspect_data(
    train: Any,
    model: str,
    *,
    rows: int | None = DEFAULT_ROWS,
    examples: int = 3,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str, int, int | None], None] | None = None,
    **settings: Any,
) -> DataReport:
    """Look at data as a model will see it.

    Args:
        train: data, as ``SFTDataModule`` takes it; preference pairs, too.
        model: whose tokenizer and chat template write it, as in ``load_base_model``; its weights are not read.
        rows: look at so many rows of a source, the first; None for all.
        examples: show so many.
        revision: branch, tag or commit of the model on the Hub.
        trust_remote_code: run code that comes with the model or the tokenizer.
        progress: called with what is done, how many rows are, and of how many.
        settings: further ones of ``SFTDataModule``.

    Raises:
        FileNotFoundError: if there is no such file or model.
        ValueError: if nothing of the data can be read, or a setting is refused.
    """
    for name, value, least in (("rows", rows, 1), ("examples", examples, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    given = {name: value for name, value in settings.items() if _can_be_written(name, value)}
    name = settings.pop("tokenizer", None)
    if isinstance(name, PreTrainedTokenizerBase):
        tokenizer, name = name, name.name_or_path or type(name).__name__
        given = {key: value for key, value in given.items() if key != "tokenizer"}
        given |= {"tokenizer": name} if tokenizer.name_or_path else {}
    else:
        source, at = (model, revision) if name is None else (name, None)
        tokenizer = load_tokenizer(source, revision=at, trust_remote_code=trust_remote_code)
    module = SFTDataModule(train, tokenizer=tokenizer, **settings)
    config = load_config(model, revision=revision, trust_remote_code=trust_remote_code).get_text_config()
    data = SourceData(sources_of(train, "data.train"), module.source_settings, module.cache_dir, None)
    look = _Look(tokenizer, module.source_settings, num_shown=examples, progress=progress or (lambda *_: None))
    sources = _with_epoch_shares([look.at(data, source, rows) for source in data.sources], data.sources)
    set_aside = [round(one.num_examples * module.validation_fraction) for one in sources]
    validation: tuple[LookedAt, ...] = ()
    if settings.get("validation") is not None:
        beside = _Look(tokenizer, look.settings, num_shown=0, progress=look.progress)
        unlimited = replace(module.source_settings, limit=None)
        held_out = SourceData(sources_of(settings["validation"], "data.validation"), unlimited, module.cache_dir, None)
        validation = tuple(beside.at(held_out, source, rows) for source in held_out.sources)
    lengths, context = look.lengths(), getattr(config, "max_position_embeddings", None)
    return DataReport(
        model={"base": model}
        | ({"revision": revision} if revision is not None else {})
        | ({"trust_remote_code": True} if trust_remote_code else {}),
        tokenizer=str(name or model),
        template="its own chat template" if tokenizer.chat_template else "the built-in chat template of Alpaca",
        sources=sources,
        validation=validation,
        num_set_aside=sum(set_aside),
        lengths=_lengths(lengths) if len(lengths) else None,
        cuts=look.cuts() if len(lengths) else (),
        ends={str(tokenizer.convert_ids_to_tokens(token)): count for token, count in look.ends.most_common()},
        num_open=look.num_open,
        examples=tuple(look.shown),
        settings=({"train": data.plain()} if all(isinstance(s.path, str) for s in data.sources) else {}) | given,
        suggested=(*look.to_train_on_pairs, *(suggest(lengths, context=context) if len(lengths) else ())),
        warnings=(
            *_warnings(look, [*sources, *validation], config.vocab_size, context),
            *(_no_split(sources, set_aside) if module.validation_fraction else ()),
        ),
    )


def _can_be_written(name: str, value: Any) -> bool:
    """Whether a setting belongs into a config: a dataset in memory does not, nor does a folder of this machine."""
    if name in ("validation", "test"):
        return isinstance(value, str)
    return name != "cache_dir"


class _Look:
    """What is kept of the rows that were looked at.

    Args:
        tokenizer: the model's.
        settings: how training would read and tokenize.
        num_shown: examples to show.
        progress: as for :func:`inspect_data`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: SourceSettings,
        *,
        num_shown: int,
        progress: Callable[[str, int, int | None], None],
    ) -> None:
        self.progress = progress
        self.tokenizer = tokenizer
        self.settings = settings
        self.num_shown = num_shown
        self.shown: list[ShownExample] = []
        self.ends: Counter[int] = Counter()
        self.num_open = 0
        self.highest_id = 0
        self.refusal: str | None = None
        """Of pairs: why they are not trained on."""
        self.to_train_on_pairs: tuple[Suggested, ...] = ()
        """What has their chosen answers trained on."""
        self._encoding = replace(settings, max_length=NO_LIMIT).encoding()
        self._end_ids = turn_end(tokenizer).ids
        self._lengths: list[NDArray[np.int64]] = []
        self._max_lengths = np.array(sorted({*_MAX_LENGTHS, settings.max_length}))
        self._lost = np.zeros((4, len(self._max_lengths)), dtype=np.int64)
        """Examples cut, tokens lost, supervised ones among them, and examples dropped, for each ``max_length``."""
        self._counts = np.zeros(3, dtype=np.int64)
        """Examples, tokens and supervised tokens."""

    def at(self, data: SourceData, source: DataSource, most_rows: int | None) -> LookedAt:
        """Look at a source.

        Raises:
            ValueError: if it is empty, or its columns fit no format.
        """
        settings, name = data.settings_of(source), described(source.path)
        limit = min((n for n in (most_rows, settings.limit) if n is not None), default=None)
        kinds, problems = ProblemKinds(), Problems(name, most=_MOST_PROBLEMS)
        layout: Layout | None = None
        pairs: PairCounts | None = None
        num_rows, is_settled, is_whole, before = 0, False, True, self._counts.copy()
        for block in read_blocks(data.readable(source)):
            if limit is not None and num_rows >= limit:
                is_whole = False
                break
            rows = list(rows_of(block, problems))
            num_rows += problems.count
            room = len(rows) if limit is None else max(0, limit - num_rows)
            is_whole, rows = room >= len(rows), rows[:room]
            num_rows += len(rows)
            if rows and not is_settled:
                layout, is_settled = self._layout(rows[0], block.file, settings), True
            if layout is not None:
                self._add(block.file, self._encoded(rows, problems, layout))
            elif rows:
                columns, ignore = settings.columns, settings.ignore_columns
                found = encode_pairs(rows, problems, self._encoded, columns=columns, ignore=ignore)
                pairs = self._add_pairs(block.file, found, pairs or PairCounts(0, 0, 0, 0, 0))
            kinds.take(problems)
            self.progress(f"looking at {name}: row", num_rows, None)
            if not is_whole:
                break
        if not num_rows:
            raise ValueError(f"{name} holds no examples: expected at least one row of data")
        num_examples, num_tokens, num_supervised = map(int, self._counts - before)
        return LookedAt(
            name=name,
            format=layout.format if layout is not None else PAIRS if pairs is not None else "no row can be read",
            num_rows=num_rows,
            is_whole=is_whole,
            num_examples=num_examples,
            num_tokens=num_tokens,
            num_supervised=num_supervised,
            problems=kinds.kinds(),
            notes=dict(problems.notes.most_common()),
            pairs=pairs,
            share=", ".join(
                f"{name} {value:g}"
                for name, value in (("weight", source.weight), ("epochs", source.epochs))
                if value is not None
            ),
        )

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, ``(N,)``; of a pair, those of the longer one."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *self._lengths])

    def cuts(self) -> tuple[Cut, ...]:
        """What each ``max_length`` would cut, from one that cuts many to the first that cuts nothing."""
        found = [
            Cut(length, cut, tokens, supervised, dropped, is_set=length == self.settings.max_length)
            for length, cut, tokens, supervised, dropped in np.vstack([self._max_lengths, self._lost]).T.tolist()
        ]
        least = float(np.median(self.lengths())) / 2
        enough = next((cut.max_length for cut in found if not cut.num_cut), found[-1].max_length)
        return tuple(cut for cut in found if cut.is_set or least <= cut.max_length <= enough)

    def _layout(self, first: Row, file: str, settings: SourceSettings) -> Layout | None:
        """What the columns mean; None for pairs."""
        format, columns = settings.format, settings.columns
        if is_pair(first.fields, format, columns):
            self.refusal = refusal(first.fields, columns)
            if chosen := split(first.fields, columns).columns:
                self.to_train_on_pairs = (Suggested("columns", chosen, "the chosen answers alone"),)
            return None
        return layout_of(first, file, format, columns)

    def _encoded(self, batch: list[Row], problems: Problems, layout: Layout) -> list[Encoded]:
        examples = parse_examples(batch, problems, layout, ignore=self.settings.ignore_columns)
        return encode_examples(self.tokenizer, examples, problems, **self._encoding)

    def _add(self, source: str, found: list[Encoded]) -> None:
        for example in found:
            self._count(example)
            if len(self.shown) < self.num_shown:
                self._show(source, example, {"": self._pieces(example)})
        self._lengths.append(np.array([len(example.ids) for example in found], dtype=np.int64))

    def _add_pairs(self, source: str, found: list[EncodedPair], counts: PairCounts) -> PairCounts:
        longer = [max(pair.chosen, pair.rejected, key=lambda encoded: len(encoded.ids)) for pair in found]
        for pair, example in zip(found, longer, strict=True):
            self._count(example)
            if len(self.shown) < self.num_shown:
                n = pair.num_prompt
                parts = {"prompt": self._pieces(pair.chosen, 0, n), CHOSEN: self._pieces(pair.chosen, n)}
                self._show(source, pair.chosen, {**parts, REJECTED: self._pieces(pair.rejected, n)})
        self._lengths.append(np.array([len(example.ids) for example in longer], dtype=np.int64))
        answers = [(len(pair.chosen.ids), len(pair.rejected.ids)) for pair in found]
        prompts = sum(pair.num_prompt for pair in found)
        return PairCounts(
            counts.num_pairs + len(found),
            counts.num_prompt_tokens + prompts,
            counts.num_chosen_tokens + sum(chosen for chosen, _ in answers) - prompts,
            counts.num_rejected_tokens + sum(rejected for _, rejected in answers) - prompts,
            counts.num_chosen_longer + sum(chosen > rejected for chosen, rejected in answers),
        )

    def _pieces(self, example: Encoded, start: int = 0, stop: int | None = None) -> tuple[Piece, ...]:
        weights = example.mask if example.weights is None else example.weights
        return pieces_of(self.tokenizer, example.ids[start:stop], weights[start:stop], self._end_ids)

    def _show(self, source: str, example: Encoded, parts: dict[str, tuple[Piece, ...]]) -> None:
        counts = (len(example.ids), sum(example.mask))
        self.shown.append(ShownExample(source, example.line, example.part, *counts, parts))

    def _count(self, example: Encoded) -> None:
        ids, mask = np.array(example.ids), np.array(example.mask)
        self._counts += [1, len(ids), mask.sum()]
        self.highest_id = max(self.highest_id, int(ids.max()))
        is_end = np.isin(ids, self._end_ids) & mask
        self.ends.update(ids[is_end].tolist())
        self.num_open += int((mask & ~np.append(mask[1:], False) & ~is_end).sum())
        kept = np.minimum(self._max_lengths, len(ids))
        kept_supervised = np.concatenate([[0], mask.cumsum()])[kept]
        is_cut = len(ids) > self._max_lengths
        if self.settings.long_rows == "drop":
            kept, kept_supervised = np.where(is_cut, 0, kept), np.where(is_cut, 0, kept_supervised)
        elif self.settings.long_rows == "split":
            kept, kept_supervised = np.full_like(kept, len(ids)), np.full_like(kept, mask.sum())
        self._lost += np.stack([is_cut, len(ids) - kept, mask.sum() - kept_supervised, kept_supervised == 0])


def _with_epoch_shares(found: Sequence[LookedAt], sources: Sequence[DataSource]) -> tuple[LookedAt, ...]:
    if len(found) == 1 or not all(one.is_whole and one.num_examples for one in found):
        return tuple(found)
    quotas = Mixture.of([one.num_examples for one in found], sources).quotas
    tokens = [quota * one.num_tokens / one.num_examples for quota, one in zip(quotas, found, strict=True)]
    return tuple(replace(one, epoch_share=part / sum(tokens)) for one, part in zip(found, tokens, strict=True))


def _lengths(lengths: NDArray[np.int64]) -> Lengths:
    median, most, nearly_all = (int(np.quantile(lengths, q, method="higher")) for q in (0.5, 0.9, 0.99))
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = 2 ** max(0, int(np.ceil(np.log2(max(1, nearly_all - shortest + 1) / _MOST_BINS))))
    edges = [*range(shortest // width * width, nearly_all + 1, width)]
    stops = [*edges[1:], max(longest, edges[-1] + width - 1) + 1]
    counts = np.histogram(lengths, [*edges, stops[-1]])[0].tolist()
    bins = tuple(Bin(start, stop - 1, count) for start, stop, count in zip(edges, stops, counts, strict=True))
    return Lengths(shortest, float(lengths.mean()), median, most, nearly_all, longest, bins)


def _no_split(sources: Sequence[LookedAt], set_aside: Sequence[int]) -> Iterator[str]:
    """Where ``validation_fraction`` leaves nothing on one side, of sources that were looked at as a whole."""
    for one, count in zip(sources, set_aside, strict=True):
        if one.is_whole and one.num_examples and not 0 < count < one.num_examples:
            yield (
                f"training refuses to set {count:,} of the {one.num_examples:,} examples of {one.name} aside: both "
                "parts need at least one"
            )


def _warnings(look: _Look, sources: Iterable[LookedAt], vocab_size: int, context: int | None) -> Iterator[str]:
    if look.refusal is not None:
        yield look.refusal
    if look.settings.on_bad_rows == "error" and any(source.problems for source in sources):
        drop = advice(", or {} to skip them", "data.on_bad_rows", "drop", otherwise="")
        yield f"training refuses data with rows that cannot be used: correct them{drop}"
    if look.highest_id >= vocab_size:
        yield (
            f"token id {look.highest_id} is outside the model's vocabulary of {vocab_size}: the tokenizer is not the "
            "model's"
        )
    if context is not None and (too_long := int((look.lengths() > context).sum())):
        yield f"{too_long:,} examples have more than the {context:,} tokens that the model takes"
