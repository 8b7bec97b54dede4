"""From a source's name to a tokenized dataset: read, check, tokenize, cache."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lit_lora.data.dataset import (
    DatasetStatistics,
    TokenizedDataset,
    cache_path,
    load_cached,
    tokenizer_digest,
)
from lit_lora.data.formats import Examples, layout_of, parse_examples
from lit_lora.data.sources import Problems, Row, read_rows, source_digest
from lit_lora.data.tokenize import Encoded, encode_examples
from lit_lora.wording import advice

TOKENIZE_BATCH = 1000
PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True)
class SourceSettings:
    """How a source is read and tokenized."""

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    max_length: int = 1024
    train_on_prompt: bool = False
    limit: int | None = None
    on_bad_rows: Literal["error", "drop"] = "error"
    train_on_turns: Literal["all", "last"] = "all"
    reasoning: Literal["keep", "mask", "drop"] = "keep"
    long_rows: Literal["truncate", "drop", "split"] = "truncate"
    ignore_columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 row, got {self.limit}")
        if self.on_bad_rows not in ("error", "drop"):
            raise ValueError(f"on_bad_rows must be 'error' or 'drop', got {self.on_bad_rows!r}")

    def encoding(self) -> dict[str, Any]:
        """What :func:`encode_examples` is told."""
        names = ("max_length", "train_on_prompt", "train_on_turns", "reasoning", "long_rows")
        return {name: getattr(self, name) for name in names} | {"ignore": self.ignore_columns}


def read_examples(source: str, settings: SourceSettings) -> Examples:
    """Read a source and bring every row into the internal form.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if nothing can be read, or rows are bad and ``settings.on_bad_rows`` is "error".
    """
    problems = Problems(source)
    rows = itertools.islice(read_rows(source, problems), settings.limit)
    examples = Examples(problems=problems)
    if (first := next(rows, None)) is not None:
        layout = layout_of(first, source, settings.format, settings.columns)
        counted = _counted(itertools.chain([first], rows), examples)
        examples.format, examples.items = (
            layout.format,
            parse_examples(counted, problems, layout, ignore=settings.ignore_columns),
        )
    _check_problems(examples, settings)
    return examples


def tokenize_source(
    source: str, tokenizer: PreTrainedTokenizerBase, settings: SourceSettings, *, cache_dir: Path
) -> TokenizedDataset:
    """The tokenized examples of a source, from the cache where it was tokenized before.

    Args:
        source: see :func:`lit_lora.data.sources.read_rows`.
        tokenizer: the model's.
        settings: how to read and tokenize.
        cache_dir: folder of the cache; made if needed.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the data cannot be trained on, or changes meanwhile; the message names lines and the fix.
    """
    parts = {"source": source_digest(source), "tokenizer": tokenizer_digest(tokenizer), **asdict(settings)}
    path = cache_path(cache_dir, parts)
    dataset = load_cached(path)
    if dataset is not None:
        return dataset
    dataset = _tokenize(source, read_examples(source, settings), tokenizer, settings)
    if source_digest(source) != parts["source"]:
        raise ValueError(f"{source} changed while it was read: start again when it is complete")
    try:
        dataset.save(path)
    except OSError as error:
        warnings.warn(f"the tokenized data is not cached: {error}", stacklevel=2)
    return dataset


def _tokenize(
    source: str, examples: Examples, tokenizer: PreTrainedTokenizerBase, settings: SourceSettings
) -> TokenizedDataset:
    encoded: list[Encoded] = []
    shown = time.monotonic()
    for start in range(0, len(examples.items), TOKENIZE_BATCH):
        batch = examples.items[start : start + TOKENIZE_BATCH]
        encoded += encode_examples(
            tokenizer,
            batch,
            examples.problems,
            **settings.encoding(),
        )
        done = start + len(batch)
        if time.monotonic() - shown > PROGRESS_EVERY_S:
            shown = time.monotonic()
            rank_zero_info(f"tokenizing {source}: {done:,} of {len(examples.items):,} examples")
    _check_problems(examples, settings)
    kept = [example for example in encoded if any(example.mask)]
    if not kept:
        raise ValueError(
            f"{source}: none of the {len(encoded)} examples has a supervised token within "
            + advice("{}", "data.max_length", settings.max_length, otherwise=f"its first {settings.max_length} tokens")
            + ": the prompts alone are longer"
            + advice("; raise {}", "data.max_length", otherwise="")
        )
    statistics = DatasetStatistics(
        source=source,
        format=examples.format,
        num_rows=examples.num_rows,
        num_duplicates=examples.num_duplicates,
        num_truncated=sum(example.truncated for example in encoded),
        num_unsupervised=len(encoded) - len(kept),
        num_bad_rows=examples.problems.count,
        bad_rows=examples.problems.shown,
        notes=dict(examples.problems.notes),
    )
    return TokenizedDataset.from_encoded(kept, statistics)


def _counted(rows: Iterable[Row], examples: Examples) -> Iterator[Row]:
    for row in rows:
        examples.num_rows += 1
        yield row


def _check_problems(examples: Examples, settings: SourceSettings) -> None:
    problems = examples.problems
    usable = max(0, len(examples.items))
    if problems.count and settings.on_bad_rows == "error":
        raise ValueError(
            f"{problems.source}: {problems.count} bad rows ({usable} are good):\n{problems}\n"
            + advice("Correct them, or {} to skip them", "data.on_bad_rows", "drop", otherwise="Correct them")
        )
    if not usable:
        detail = f"; all {problems.count} rows are bad:\n{problems}" if problems.count else ""
        raise ValueError(f"{problems.source} holds no examples: expected at least one row of data{detail}")
