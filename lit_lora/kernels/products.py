"""Matrix products: float32 on a CPU by the library that is fast on it, half precision on CUDA with wide sums.

torch multiplies float32 matrices with Intel's MKL, which uses AVX512 on Intel's processors only; oneDNN, also part of
torch, uses it on all. On an AMD EPYC it is more than twice as fast (``benchmarks/NOTES.md``). torch has no setting that
chooses between them for float32, so its own operator for compiled graphs is called here. Both round products to
float32; the sums are taken in another order.

Which library is asked depends on the processor and on the shapes alone, never on timing, so that a run that is resumed
computes what it would have computed. ``torch.backends.mkldnn.enabled = False`` switches oneDNN off. Nothing here
is differentiable: it serves the autograd functions that have formulas of their own.

On CUDA a product of half-precision matrices can be had in float32 as it was summed (``torch.mm`` with ``out_dtype``):
nothing is rounded to half precision on the way, and no operand is copied.

Shapes: M rows, K inner dimension, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora.kernels.cpu_features import by_amd
from lit_lora.kernels.cuda_way import HALF, has_no_values, sums_in_float32, takes_cuda_way

_SMALL = 2**20
"""Multiply-adds below which preparing oneDNN's kernel for a new shape costs more than it gives."""

_FEWEST_ROWS = 16
"""Numbers of rows for which oneDNN's kernels are shared start here."""


@torch.compiler.assume_constant_result
def onednn_is_faster() -> bool:
    """Whether large products go to oneDNN: torch was built with it, and the processor is one by AMD."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled) and by_amd()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, without a graph.

    Args:
        x: ``(M, K)``.
        weight: ``(N, K)``.
        bias: ``(N,)``.
    """
    if not _onednn_may_serve(x, weight):
        return F.linear(x, weight, bias)
    return _opaque_linear(x, weight, bias) if torch.compiler.is_compiling() else _linear_by_size(x, weight, bias)


def linear_of_rows(x: Tensor, rows: slice, weight: Tensor) -> Tensor:
    """``x[rows] @ weight.T``, without a graph, where the number of rows is another one with each call.

    The rows next to these are multiplied with them and left out, so that few numbers of rows are met: see
    :func:`shared_num_rows`.

    Args:
        x: ``(M, K)``.
        rows: which to multiply, with both ends.
        weight: ``(N, K)``.
    """
    num_rows = rows.stop - rows.start
    num_together = min(shared_num_rows(num_rows, x, weight), len(x))
    start = min(rows.start, len(x) - num_together)
    product = linear(x[start : start + num_together], weight)
    return product[rows.start - start :][:num_rows]


def shared_num_rows(num_rows: int, x: Tensor, weight: Tensor) -> int:
    """How many rows to multiply instead of ``num_rows``, so that one kernel serves products of several sizes.

    Of each shape that oneDNN is given, it and torch keep a kernel, half a MB each. Whoever has another number of rows
    each time rounds it up: to 16, and by an eighth at most above 128. A product without such a kernel is left as it is.

    Args:
        num_rows: at least 1.
        x: for its dtype and device.
        weight: ``(N, K)``.
    """
    by_torch = x.dtype is torch.bfloat16 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    by_us = _onednn_may_serve(x, weight) and num_rows * weight.numel() >= _SMALL
    if not (by_torch or by_us):
        return num_rows
    step = max(_FEWEST_ROWS, (1 << (num_rows - 1).bit_length()) >> 4)
    return -(-num_rows // step) * step


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, without a graph.

    Args:
        left: ``(M, K)``, or a batch ``(B, M, K)``.
        right: ``(K, N)``, or ``(B, K, N)``.
    """
    if left.ndim == 2:
        return linear(left, right.t())
    if not _onednn_may_serve(left, right) or left[0].numel() * right.shape[-1] < _SMALL:
        return left @ right
    if len(left) == 1:
        return _onednn_linear(left[0], right[0].t())[None]
    return torch.stack([_onednn_linear(a, b.t()) for a, b in zip(left, right, strict=True)])


def matmul_float32(left: Tensor, right: Tensor, scale: float | None = None) -> Tensor:
    """``scale * left @ right`` in float32, without a graph; on CUDA half precision is not rounded before.

    Args:
        left: ``(M, K)``.
        right: ``(K, N)``.
        scale: factor on the product; none by default.
    """
    if left.dtype not in HALF or not takes_cuda_way(left):
        product = matmul(left, right).float()
    elif not sums_in_float32(left):
        product = left.float() @ right.float()
    elif scale is None or has_no_values(left) or torch.compiler.is_compiling():  # torch 2.11 cannot trace the other one
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:  # with beta=0 the first operand is not read
        unread = left.new_empty((), dtype=torch.float32)
        return torch.addmm(unread, left, right, out_dtype=torch.float32, beta=0, alpha=scale)
    return product if scale is None else product.mul_(scale)


def _onednn_may_serve(x: Tensor, weight: Tensor) -> bool:
    return x.dtype is weight.dtype is torch.float32 and x.device.type == "cpu" and onednn_is_faster()


def _linear_by_size(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    small = x.shape[0] * weight.numel() < _SMALL
    return F.linear(x, weight, bias) if small else _onednn_linear(x, weight, bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # with gaps between rows oneDNN takes a slow general kernel
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("lit_lora::linear", mutates_args=())
def _opaque_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """For compiled graphs, which then need not know its size: inductor (2.13) lowers oneDNN's for one size only."""
    return _linear_by_size(x, weight, bias)


@_opaque_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
