"""Rows sorted by expert, each times the weight of its own expert and its adapter: nothing is as large as all experts.

Frozen weights get no gradient, so that the backward pass reads them once more and writes nothing of their size. PEFT
adds the adapters to all experts first: it writes the sum, keeps it for the backward pass, and gets a gradient of that
size, of which the factors' follow.

On a CPU experts take turns, with the fastest library for the weights (``kernels/products.py``) and torch's own products
for the factors, which are small and as long as an expert has rows: no kernel is made and kept for each such number. On
CUDA torch's grouped product takes all at once, without waiting to hear how many rows each one has.

Shapes: S rows, E experts, M inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora.base.quantized_linear import without_autocast
from lit_lora.kernels import products
from lit_lora.kernels.cuda_way import has_no_values

_ALIGNED_BYTES = 16
"""Rows of a grouped product start at multiples of this."""


def grouped_product(x: Tensor, weight: Tensor, P: Tensor, Q: Tensor, offs: Tensor, scaling: float) -> Tensor:
    """``x @ weight[e] + scaling * (x @ P[e].T) @ Q[e]`` for the rows of each expert ``e``.

    Args:
        x: sorted by expert, ``(S, M)``.
        weight: frozen, ``(E, M, N)``, in any layout.
        P: ``(E, R, M)``.
        Q: ``(E, R, N)``.
        offs: the row at which each expert's end, ``(E,)``, as ``F.grouped_mm`` takes it.
        scaling: factor on the adapters.

    Returns:
        ``(S, N)`` in the dtype of the weight; zeros in rows after the last expert's. On a CPU it can be differentiated
        once.
    """
    assert not weight.requires_grad, "frozen experts have no gradient here"
    x = x.to(weight.dtype)
    if x.is_cuda or has_no_values(x):
        return _by_grouped_mm(x, weight, P, Q, offs, scaling)
    return _GroupedProduct.apply(x, weight, P, Q, offs.tolist(), scaling)


def _by_grouped_mm(x: Tensor, weight: Tensor, P: Tensor, Q: Tensor, offs: Tensor, scaling: float) -> Tensor:
    padding = -P.shape[1] % (_ALIGNED_BYTES // weight.element_size())
    P, Q = (F.pad(factor.to(weight.dtype), (0, 0, 0, padding)) for factor in (P * scaling, Q))
    down_SR = F.grouped_mm(x, P.mT, offs=offs)
    return F.grouped_mm(x, weight, offs=offs) + F.grouped_mm(down_SR, Q, offs=offs)


class _GroupedProduct(torch.autograd.Function):
    """Products with the adapter are in its own dtype, as those of a linear layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, P: Tensor, Q: Tensor, ends: Sequence[int], scaling: float
    ) -> Tensor:
        y_SN = x.new_empty(len(x), weight.shape[2])
        down_SR = x.new_empty(len(x), P.shape[1], dtype=P.dtype)
        with without_autocast(x):
            for expert, rows in _rows_of_experts(ends):
                y, down = y_SN[rows], down_SR[rows]
                y.copy_(products.linear_of_rows(x, rows, weight[expert].t()))
                torch.mm(x[rows].to(P.dtype), P[expert].t(), out=down)
                _add_product_(y, down, Q[expert], scaling)
        y_SN[ends[-1] :] = 0
        ctx.save_for_backward(x, weight, P, Q, down_SR)
        ctx.ends, ctx.scaling = ends, scaling
        return y_SN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, P, Q, down_SR = ctx.saved_tensors
        needs_x, _, needs_P, needs_Q, *_ = ctx.needs_input_grad
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_P = torch.zeros_like(P) if needs_P else None
        grad_Q = torch.zeros_like(Q) if needs_Q else None
        with without_autocast(grad):
            for expert, rows in _rows_of_experts(ctx.ends):
                adapters = grad[rows].to(P.dtype)
                if grad_Q is not None:
                    torch.mm(down_SR[rows].t(), adapters, out=grad_Q[expert]).mul_(ctx.scaling)
                grad_down_SR = (adapters @ Q[expert].t()).mul_(ctx.scaling)
                if grad_P is not None:
                    torch.mm(grad_down_SR.t(), x[rows].to(P.dtype), out=grad_P[expert])
                if grad_x is not None:
                    grad_x[rows] = products.linear_of_rows(grad, rows, weight[expert])
                    _add_product_(grad_x[rows], grad_down_SR, P[expert], 1.0)
        return grad_x, None, grad_P, grad_Q, None, None


def _rows_of_experts(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    for expert, (start, end) in enumerate(pairwise((0, *ends))):
        if end > start:
            yield expert, slice(start, end)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(left @ right, alpha=scale)
