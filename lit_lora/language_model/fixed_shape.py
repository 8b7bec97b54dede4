"""A packed batch brought to one of few shapes, by tokens and targets that count nothing: loss and gradients stay.

What is added is an example of its own at the end, which no other one sees, and targets of weight zero. So that there
are few shapes, a batch of T tokens becomes one of a multiple of an eighth of the power of two below (at least 128), and
its targets a multiple of a quarter of that. The shape depends on the batch alone.

Shapes: T tokens of the batch, S supervised positions, N examples; primed letters are those of the fixed shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_lora.batch import Batch

_SMALLEST = 128
_EXAMPLES = 16
"""A multiple of so many: those without tokens cost next to nothing."""


class Shape(NamedTuple):
    """Of a batch, in the numbers that a step's tensors depend on."""

    tokens: int
    targets: int
    examples: int
    """With the one that is added."""


def shape_for(batch: Batch) -> Shape:
    """The smallest shape that takes a packed batch."""
    tokens = _rounded(batch["input_ids"].numel())
    quarter = tokens // 4
    targets = quarter * max(1, -(-batch["target_ids"].numel() // quarter))
    examples = _EXAMPLES * -(-len(batch["cu_seq_lens"]) // _EXAMPLES)  # one more than there are examples
    return Shape(tokens, targets, examples)


def _rounded(tokens: int) -> int:
    eighth = max(_SMALLEST, 1 << (tokens - 1).bit_length() - 1 >> 3) if tokens > 1 else _SMALLEST
    return eighth * -(-tokens // eighth)


class FixedBatch:
    """Tensors of one shape, to which batches are copied: where they lie never changes.

    Args:
        shape: what it takes.
        device: of its tensors.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        sizes = [shape.tokens, shape.tokens, shape.targets, shape.targets]
        self._integers = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        ids, positions, target_positions, target_ids = self._integers.split(sizes)
        self._offsets = torch.full((shape.examples + 1,), shape.tokens, dtype=torch.int32, device=device)
        self._weights = torch.zeros(shape.targets, dtype=torch.float32, device=device)
        self._no_tokens = torch.zeros(shape.tokens, dtype=torch.int64, device=device)
        self._counts = torch.ones(shape.targets, dtype=torch.float32, device=device)
        self._counts_not = torch.zeros(shape.targets, dtype=torch.float32, device=device)
        self._ends = self._offsets.clone()
        self.batch: Batch = {
            "input_ids": ids[None], "position_ids": positions[None], "cu_seq_lens": self._offsets,
            "target_positions": target_positions, "target_ids": target_ids, "target_weights": self._weights,
            "longest": shape.tokens,
        }  # fmt: skip

    def filled(self, batch: Batch) -> Batch:
        """``batch`` in these tensors, in three launches: it holds until the next one is filled in."""
        ids, offsets, targets = batch["input_ids"][0], batch["cu_seq_lens"], batch["target_ids"]
        no_tokens = self._no_tokens[: self.shape.tokens - len(ids)]
        missing = self.shape.targets - len(targets)
        no_targets = self._no_tokens[:missing]
        parts = [ids, no_tokens, batch["position_ids"][0], no_tokens]
        parts += [batch["target_positions"], no_targets, targets, no_targets]
        torch.cat(parts, out=self._integers)
        torch.cat([offsets, self._ends[len(offsets) :]], out=self._offsets)
        weights: Tensor = batch.get("target_weights", self._counts[: len(targets)])
        torch.cat([weights, self._counts_not[:missing]], out=self._weights)
        return self.batch
