"""How much there is in a batch: tokens, supervised tokens, samples. Counts that lie on a device stay there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_IGNORED_LABEL = -100  # transformers' convention

Count = int | Tensor


def count(batch: Any) -> tuple[Count, Count, Count]:
    """Tokens, supervised tokens and samples of a batch; zero for what it does not tell."""
    samples = _batch_size(batch)
    if not isinstance(batch, Mapping):
        return 0, 0, samples
    tokens: Count = 0
    if "num_tokens" in batch:
        tokens = batch["num_tokens"]
    elif isinstance(batch.get("attention_mask"), Tensor):
        tokens = batch["attention_mask"].sum()
    elif isinstance(batch.get("input_ids"), Tensor):
        tokens = batch["input_ids"].numel()
    targets: Count = 0
    if isinstance(batch.get("target_positions"), Tensor):
        targets = batch["target_positions"].numel()
    elif isinstance(batch.get("labels"), Tensor) and batch["labels"].dim() == 2:
        targets = (batch["labels"][:, 1:] != _IGNORED_LABEL).sum()  # transformers shifts: no target for the first token
    if isinstance(batch.get("example_ids"), Tensor):
        samples = batch["example_ids"].numel()
    return tokens, targets, samples


def _batch_size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.dim() else 1
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(_batch_size, entries) if size), 0)
