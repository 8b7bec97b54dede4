"""What the data module prints before training, so that a wrong template or mask is seen at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_lora.data.dataset import DatasetStatistics, TokenizedDataset
from lit_lora.data.sampler import BatchSettings, plan_batches

PREVIEW_TOKENS = 400


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
    preview: str
    """The first example: what is not supervised stands in 〔 〕."""

    def __str__(self) -> str:
        statistics = self.statistics
        share = self.num_supervised / self.num_tokens
        layout = "packed, no padding" if self.padding_share is None else f"{self.padding_share:.0%} padding"
        lines = [
            f"{statistics.source} ({statistics.format}): {self.num_examples:,} examples, {self.num_tokens:,} tokens, "
            f"{share:.0%} supervised; {self.num_batches:,} micro-batches an epoch, {layout}",
        ]
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
        lines += ["  first example, 〔not supervised〕:", *(f"  | {line}" for line in self.preview.splitlines())]
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
        preview=preview(dataset, tokenizer),
    )


def preview(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerBase, index: int = 0) -> str:
    """One example as text, with what is not supervised in 〔 〕; long ones are cut."""
    example = dataset[index]
    ids, mask = example.ids[:PREVIEW_TOKENS], example.mask[:PREVIEW_TOKENS]
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)]
    pieces = []
    for start, end in itertools.pairwise(borders):
        text = str(tokenizer.decode(ids[start:end].tolist()))
        pieces.append(text if mask[start] else f"〔{text}〕")
    return "".join(pieces) + (" ..." if len(example.ids) > PREVIEW_TOKENS else "")
