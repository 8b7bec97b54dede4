"""Float32 matrix products on a CPU, by the library that is fast on it.

torch multiplies float32 matrices with Intel's MKL, which uses AVX512 on Intel's processors only; oneDNN, also part of
torch, uses it on all. On an AMD EPYC it is more than twice as fast (``benchmarks/NOTES.md``). torch has no setting that
chooses between them for float32, so its own operator for compiled graphs is called here. Both round products to
float32; the sums are taken in another order.

Which library is asked depends on the processor and on the shapes alone, never on timing, so that a run that is resumed
computes what it would have computed. ``torch.backends.mkldnn.enabled = False`` switches oneDNN off. Nothing here
is differentiable: it serves the autograd functions that have formulas of their own.

Shapes: M rows, K inner dimension, N columns.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALL = 2**20
"""Multiply-adds below which preparing oneDNN's kernel for a new shape costs more than it gives."""


@cache
def _by_amd() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        described = platform.processor()
    return "AuthenticAMD" in described


def onednn_is_faster() -> bool:
    """Whether large products go to oneDNN: torch was built with it, and the processor is one by AMD."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled) and _by_amd()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, without a graph.

    Args:
        x: ``(M, K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``.
    """
    if _by_onednn(x, weight, len(x) * weight.numel()):
        return torch.ops.mkldnn._linear_pointwise(x, _dense(weight), bias, "none", [], "")
    return F.linear(x, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, without a graph.

    Args:
        left: ``(M, K)``, or a batch ``(B, M, K)``.
        right: ``(K, N)``, or ``(B, K, N)``.
    """
    if left.ndim == 2 or not _by_onednn(left, right, left[0].numel() * right.shape[-1]):
        return linear(left, right.t()) if left.ndim == 2 else left @ right
    return torch.stack([linear(a, b.t()) for a, b in zip(left, right, strict=True)])


def _by_onednn(x: Tensor, weight: Tensor, num_products: int) -> bool:
    return (
        x.dtype is weight.dtype is torch.float32
        and x.device.type == "cpu"
        and num_products >= _SMALL
        and onednn_is_faster()
    )


def _dense(weight: Tensor) -> Tensor:
    """As rows or columns without gaps: what lies otherwise, oneDNN multiplies with a slow general kernel."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
