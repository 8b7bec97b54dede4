"""What the data module prints before training, so that a wrong template or mask is seen at once."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_lora.data.batches.mixture import Mixture
from lit_lora.data.batches.sampler import BatchSettings, plan_batches
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.data.look.pieces import LEGEND, as_text, pieces_of
from lit_lora.data.prepared.dataset import ChosenExamples, DatasetStatistics, Examples

_NUM_LOOKED_AT = 1000
"""Examples that are searched for what ends an answer."""


@dataclass(frozen=True)
class SourceSummary:
    """One source of the training data."""

    statistics: DatasetStatistics
    num_examples: int
    num_tokens: int
    num_supervised: int
    num_in_epoch: int
    """Examples that an epoch takes of it."""

    def lines(self) -> list[str]:
        """What became of its rows; the first line is about all of it."""
        statistics = self.statistics
        own = "" if self.num_in_epoch == self.num_examples else f"; {self.num_in_epoch:,} examples in an epoch"
        counts = {
            "truncated at max_length": statistics.num_truncated,
            "dropped: no supervised token left after truncation": statistics.num_unsupervised,
            "dropped: bad rows": statistics.num_bad_rows,
            "exact duplicates (kept)": statistics.num_duplicates,
        }
        return [
            f"{statistics.source} ({statistics.format}): {amounts(self)}{own}",
            *(f"  {count:,} {what}" for what, count in counts.items() if count),
            *(f"    {problem}" for problem in statistics.bad_rows),
            *(f"  {count:,} times: {note}" for note, count in sorted(statistics.notes.items())),
        ]


@dataclass(frozen=True)
class DataSummary:
    """The training data in numbers, with one example as the model sees it."""

    sources: tuple[SourceSummary, ...]
    num_examples: int
    num_tokens: int
    num_supervised: int
    num_validation: int
    num_batches: int
    """Micro-batches in an epoch, over all ranks."""
    padding_share: float | None
    """Share of padding in the batches of the first epoch; None where batches are packed."""
    ends: dict[str, int]
    """What ends an answer and is supervised -> in how many of the examples that were looked at."""
    num_looked_at: int
    preview: str
    """The first example, see :mod:`lit_lora.data.look.pieces`."""

    @property
    def statistics(self) -> DatasetStatistics:
        """Of the first source."""
        return self.sources[0].statistics

    def __str__(self) -> str:
        example = [f"  | {line}" for line in self.preview.splitlines()]
        return "\n".join([self.in_numbers, f"  first example, {LEGEND}:", *example])

    @property
    def in_numbers(self) -> str:
        """What is in the data, and what was left out of it."""
        layout = "packed, no padding" if self.padding_share is None else f"{self.padding_share:.0%} padding"
        batches = f"; {self.num_batches:,} micro-batches an epoch, {layout}"
        if len(self.sources) == 1:
            first, *lines = self.sources[0].lines()
            lines = [first + batches, *lines]
        else:
            lines = [f"{len(self.sources)} sources: {amounts(self)}{batches}"]
            lines += [f"  {line}" for source in self.sources for line in source.lines()]
        ends = ", ".join(f"{token} (in {count:,} of {self.num_looked_at:,})" for token, count in self.ends.items())
        lines.append(f"  supervised end of an answer: {ends or 'no token for it'}")
        if self.num_validation:
            lines.append(f"  {self.num_validation:,} examples for validation")
        return "\n".join(lines)


def amounts(of: SourceSummary | DataSummary) -> str:
    """Examples and tokens in words."""
    share = of.num_supervised / of.num_tokens
    return f"{of.num_examples:,} examples, {of.num_tokens:,} tokens, {share:.0%} supervised"


def summarize(
    dataset: Examples,
    tokenizer: PreTrainedTokenizerBase,
    settings: BatchSettings,
    validation: Examples | None = None,
    mixture: Mixture | None = None,
) -> DataSummary:
    """Count what is in the data, and decode its first example.

    Args:
        dataset: training data.
        tokenizer: that made it.
        settings: of its batches.
        validation: validation data.
        mixture: which examples an epoch takes, where that is not each once.
    """
    batches = plan_batches(dataset.lengths, settings, mixture=mixture)
    lengths = dataset.lengths
    padding_share = None
    if settings.padded:
        padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
        padding_share = 1 - sum(int(lengths[batch].sum()) for batch in batches) / padded
    return DataSummary(
        sources=_sources(dataset, mixture),
        num_examples=len(dataset),
        num_tokens=dataset.num_tokens,
        num_supervised=dataset.num_supervised,
        num_validation=0 if validation is None else len(validation),
        num_batches=len(batches),
        padding_share=padding_share,
        ends=supervised_ends(dataset, tokenizer),
        num_looked_at=min(len(dataset), _NUM_LOOKED_AT),
        preview=preview(dataset, tokenizer),
    )


def _sources(dataset: Examples, mixture: Mixture | None) -> tuple[SourceSummary, ...]:
    parts = dataset.parts if isinstance(dataset, ChosenExamples) else [(dataset, None)]
    statistics = [data.statistics for data, _ in parts]
    lengths, supervised = dataset.lengths, dataset.supervised
    return tuple(
        SourceSummary(
            entry,
            stop - start,
            int(lengths[start:stop].sum()),
            int(supervised[start:stop].sum(dtype=np.int64)),
            stop - start if mixture is None else mixture.quotas[number],
        )
        for number, (entry, (start, stop)) in enumerate(
            zip(statistics, itertools.pairwise(dataset.starts), strict=True)
        )
    )


def supervised_ends(dataset: Examples, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that end an answer and are supervised, and in how many of the first examples each is."""
    ids = turn_end(tokenizer).ids
    found: Counter[int] = Counter()
    for index in range(min(len(dataset), _NUM_LOOKED_AT)):
        example = dataset[index]
        found.update(np.unique(example.ids[example.mask & np.isin(example.ids, ids)]).tolist())
    return {str(tokenizer.convert_ids_to_tokens(token)): count for token, count in found.most_common()}


def preview(dataset: Examples, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
    """One example as text with marks; long ones are cut."""
    example = dataset[index]
    weights = example.mask if example.weights is None else example.weights
    return as_text(pieces_of(tokenizer, example.ids, weights, turn_end(tokenizer).ids))
