"""What the data module prints before training, so that a wrong template or mask is seen at once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_lora.data.dataset import DatasetStatistics, TokenizedDataset
from lit_lora.data.pieces import LEGEND, as_text, pieces_of
from lit_lora.data.sampler import BatchSettings, plan_batches
from lit_lora.data.turn_end import turn_end

_NUM_LOOKED_AT = 1000
"""Examples that are searched for what ends an answer."""


@dataclass(frozen=True)
class DataSummary:
    """The training data in numbers, with one example as the model sees it."""

    statistics: DatasetStatistics
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
    """The first example, see :mod:`lit_lora.data.pieces`."""

    def __str__(self) -> str:
        statistics = self.statistics
        share = self.num_supervised / self.num_tokens
        layout = "packed, no padding" if self.padding_share is None else f"{self.padding_share:.0%} padding"
        lines = [
            f"{statistics.source} ({statistics.format}): {self.num_examples:,} examples, {self.num_tokens:,} tokens, "
            f"{share:.0%} supervised; {self.num_batches:,} micro-batches an epoch, {layout}",
        ]
        ends = ", ".join(f"{token} (in {count:,} of {self.num_looked_at:,})" for token, count in self.ends.items())
        lines.append(f"  supervised end of an answer: {ends or 'no token for it'}")
        if self.num_validation:
            lines.append(f"  {self.num_validation:,} examples for validation")
        counts = {
            "truncated at max_length": statistics.num_truncated,
            "dropped: no supervised token left after truncation": statistics.num_unsupervised,
            "dropped: bad rows": statistics.num_bad_rows,
            "exact duplicates (kept)": statistics.num_duplicates,
        }
        lines += [f"  {count:,} {what}" for what, count in counts.items() if count]
        lines += [f"    {problem}" for problem in statistics.bad_rows]
        lines += [f"  {count:,} times: {note}" for note, count in sorted(statistics.notes.items())]
        lines += [f"  first example, {LEGEND}:", *(f"  | {line}" for line in self.preview.splitlines())]
        return "\n".join(lines)


def summarize(
    dataset: TokenizedDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: BatchSettings,
    *,
    num_validation: int = 0,
) -> DataSummary:
    """Count what is in the data, and decode its first example."""
    batches = plan_batches(dataset.lengths, settings)
    lengths = dataset.lengths
    padding_share = None
    if settings.padded:
        padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
        padding_share = 1 - len(dataset.ids) / padded
    return DataSummary(
        statistics=dataset.statistics,
        num_examples=len(dataset),
        num_tokens=len(dataset.ids),
        num_supervised=int(dataset.mask.sum()),
        num_validation=num_validation,
        num_batches=len(batches),
        padding_share=padding_share,
        ends=supervised_ends(dataset, tokenizer),
        num_looked_at=min(len(dataset), _NUM_LOOKED_AT),
        preview=preview(dataset, tokenizer),
    )


def supervised_ends(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that end an answer and are supervised, and in how many of the first examples each is."""
    ids = turn_end(tokenizer).ids
    found: Counter[int] = Counter()
    for index in range(min(len(dataset), _NUM_LOOKED_AT)):
        example = dataset[index]
        found.update(np.unique(example.ids[example.mask & np.isin(example.ids, ids)]).tolist())
    return {str(tokenizer.convert_ids_to_tokens(token)): count for token, count in found.most_common()}


def preview(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
    """One example as text with marks; long ones are cut."""
    example = dataset[index]
    weights = example.mask if example.weights is None else example.weights
    return as_text(pieces_of(tokenizer, example.ids, weights, turn_end(tokenizer).ids))
