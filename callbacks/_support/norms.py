"""Norms of gradients, many at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_lora.callbacks._support.trainer import norm_dtype


def gradient_norms(grads: Sequence[Tensor], order: float) -> Tensor:
    """Norm of each gradient, ``(P,)`` float32 (float64 if a gradient is), on the first one's device."""
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads]
    found = torch._foreach_norm(dense, order, dtype=norm_dtype(dense))
    return torch.stack([norm.to(dense[0].device, non_blocking=True) for norm in found])


def any_not_finite(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether one of them holds NaN or infinity, on ``device``; nothing waits for it."""
    flags = [~torch.isfinite(value).all() for value in values]
    return torch.stack(flags).any().to(device) if flags else torch.zeros((), dtype=torch.bool, device=device)
