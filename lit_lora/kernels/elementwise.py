"""Norms, rotary positions and SwiGLU, in half precision: one kernel each on CUDA, a few rows at a time on a CPU.

Written with torch's operators, as models write them, they are chains of small kernels, each of which reads and writes
all of its operands, and some of which keep float32 copies for the backward pass. Here the norm is torch's own fused
kernel, which ``F.rms_norm`` takes on CUDA, and the two others are written in Triton (``elementwise_triton.py``).
All compute in float32 and round once, where the chains round after each operator.

On a CPU the same formulas run on torch's operators, a few rows at a time, so that their float32 copies are read from
where they were just written, and enough of them that each thread has some. On tensors without values nothing runs, and
what the kernels would allocate is allocated.

Shapes: B batch, T tokens, H heads, E head dimension (its halves rotate together), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora.kernels.cuda_way import HALF, computes_half, has_no_values, runs_triton, takes_cuda_way

_IN_CACHE = 2**16
"""Elements that a thread of a CPU computes together: as many float32 copies as a formula has fit its second cache, and
more than the 32,768 below which torch takes one thread for all."""


def serves(x: Tensor) -> bool:
    """Whether what is computed from ``x`` is computed here."""
    return x.dtype in HALF and computes_half(x)


def serves_positions(x: Tensor) -> bool:
    """Whether rotary positions of ``x`` are: on a CPU in float32 too, where the model's own chain takes three times as
    long. Its norm in float32 is as fast as ours, and rounds alike."""
    return serves(x) or (x.dtype is torch.float32 and x.device.type == "cpu" and not takes_cuda_way(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension.

    Args:
        x: ``(..., D)``.
        weight: ``(D,)``, frozen, in the dtype of ``x``.
        eps: added to the mean square.
    """
    assert not weight.requires_grad, "on tensors without values it has no gradient for the weight"
    if has_no_values(x):
        return _NormWithoutValues.apply(x)
    return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else _NormByRows.apply(x, weight, eps)


class _NormByRows(torch.autograd.Function):
    """On a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        wide_weight = weight.float()

        def compute(x: Tensor, out: Tensor, scale: Tensor) -> None:
            wide = x.to(torch.float32, copy=True)
            torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps), out=scale)
            out.copy_(wide.mul_(scale).mul_(wide_weight))

        _by_rows(compute, x, out, scale)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        wide_weight = weight.float()

        def compute(grad: Tensor, x: Tensor, out: Tensor, scale: Tensor) -> None:
            normed, wide = x.float() * scale, grad.float() * wide_weight
            along = (wide * normed).mean(-1, keepdim=True)
            out.copy_(wide.sub_(normed.mul_(along)).mul_(scale))

        _by_rows(compute, grad, x, out, scale)
        return out, None, None


class _NormWithoutValues(torch.autograd.Function):
    """What torch's fused kernel allocates and keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions (arXiv:2104.09864) in the layout of transformers: ``x * cos + cat(-x2, x1) * sin``.

    Args:
        query: ``(B, H, T, E)``.
        key: ``(B, K, T, E)``.
        cos: ``(B or 1, T, E)``.
        sin: as ``cos``.

    Returns:
        Query and key, rotated; can be differentiated once.
    """
    return _Rotation.apply(query, key, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(query, key, cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotated(grad_query, grad_key, *ctx.saved_tensors, back=True), None, None


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    # As tokens come out of a projection, whatever the view: attention over a packed batch then copies nothing.
    outs = tuple(torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (query, key))
    turned = (outs[0].transpose(1, 2), outs[1].transpose(1, 2))
    if runs_triton(query):
        from lit_lora.kernels.elementwise_triton import rotate_

        rotate_(turned, (query, key), cos, sin, back=back)
    elif not has_no_values(query):
        wide_cos, wide_sin = cos.float()[:, :, None], sin.float()[:, :, None]
        for out, x in zip(outs, (query, key), strict=True):
            out.copy_(_rotated_by_operators(x.transpose(1, 2).float(), wide_cos, wide_sin, back=back))
    return turned


def _rotated_by_operators(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    (x1, x2), (sin1, sin2) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    out = x * cos
    out1, out2 = out.chunk(2, dim=-1)
    if back:
        out1.addcmul_(x2, sin2)
        out2.addcmul_(x1, sin1, value=-1)
    else:
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, without a graph."""
    if runs_triton(gate):
        from lit_lora.kernels import elementwise_triton

        return elementwise_triton.swiglu(gate, up)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if not has_no_values(gate):
        _by_rows(lambda out, gate, up: out.copy_(F.silu(gate.float()).mul_(up.float())), out, gate, up)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate`` and ``up``; that of ``gate`` takes the place of ``grad``, which is contiguous."""
    if runs_triton(gate):
        from lit_lora.kernels import elementwise_triton

        return elementwise_triton.swiglu_backward_(gate, up, grad)
    grad_up = torch.empty_like(grad)

    def compute(gate: Tensor, up: Tensor, grad: Tensor, grad_up: Tensor) -> None:
        wide, grad_product = gate.to(torch.float32, copy=True), grad.float()
        sigmoid = wide.sigmoid()
        silu = wide.mul_(sigmoid)
        grad_up.copy_(silu * grad_product)
        slope = sigmoid.addcmul_(silu, sigmoid, value=-1).add_(silu)
        grad.copy_(grad_product.mul_(up.float()).mul_(slope))

    if not has_no_values(gate):
        _by_rows(compute, gate, up, grad, grad_up)
    return grad, grad_up


def _by_rows(compute: Callable[..., object], *tensors: Tensor) -> None:
    """Call ``compute`` with the same few rows of each; what it writes into is contiguous."""
    matrices = [x.reshape(-1, x.shape[-1]) for x in tensors]
    if torch.compiler.is_compiling():  # it fuses the formula, whose copies then do not exist
        compute(*matrices)
        return
    size = max(1, torch.get_num_threads() * _IN_CACHE // max(x.shape[1] for x in matrices))
    for rows in zip(*(x.split(size) for x in matrices), strict=True):
        compute(*rows)
