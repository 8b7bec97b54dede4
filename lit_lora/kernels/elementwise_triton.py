"""The Triton kernels behind ``elementwise.py``: read once, computed in float32, written once.

Imported only where Triton is installed and a tensor is on CUDA. Held against float64 on an H200 with torch 2.11 and
Triton 3.6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements of a program."""


@triton.jit
def _swiglu_kernel(gate: tl.tensor, up: tl.tensor, out: tl.tensor, num: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    gate: tl.tensor, up: tl.tensor, grad: tl.tensor, grad_up: tl.tensor, num: tl.tensor, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num
    g = tl.load(gate + at, mask=inside).to(tl.float32)
    u = tl.load(up + at, mask=inside).to(tl.float32)
    d = tl.load(grad + at, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    tl.store(grad_up + at, d * g * sigmoid, mask=inside)
    tl.store(grad + at, d * u * sigmoid * (1 + g * (1 - sigmoid)), mask=inside)


@triton.jit
def _turn_heads(
    x: tl.tensor,
    out: tl.tensor,
    stride_h: tl.tensor,
    out_stride_h: tl.tensor,
    cos1: tl.tensor,
    cos2: tl.tensor,
    sin1: tl.tensor,
    sin2: tl.tensor,
    num_heads: tl.tensor,
    half: tl.tensor,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    column = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, HEADS)[:, None]
    inside = (head < num_heads) & (column < half)
    x1 = tl.load(x + head * stride_h + column, mask=inside).to(tl.float32)
    x2 = tl.load(x + head * stride_h + half + column, mask=inside).to(tl.float32)
    if BACK:
        y1 = x1 * cos1 + x2 * sin2
        y2 = x2 * cos2 - x1 * sin1
    else:
        y1 = x1 * cos1 - x2 * sin1
        y2 = x2 * cos2 + x1 * sin2
    tl.store(out + head * out_stride_h + column, y1, mask=inside)
    tl.store(out + head * out_stride_h + half + column, y2, mask=inside)


@triton.jit
def _rotate_kernel(
    query: tl.tensor,
    key: tl.tensor,
    out_query: tl.tensor,
    out_key: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    num_tokens: tl.tensor,
    half: tl.tensor,
    query_b: tl.tensor,
    query_h: tl.tensor,
    query_t: tl.tensor,
    key_b: tl.tensor,
    key_h: tl.tensor,
    key_t: tl.tensor,
    cos_b: tl.tensor,
    cos_t: tl.tensor,
    sin_b: tl.tensor,
    sin_t: tl.tensor,
    num_query_heads: tl.tensor,
    num_key_heads: tl.tensor,
    BACK: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    column = tl.arange(0, HALF)[None, :]
    inside = column < half
    cos += batch * cos_b + token * cos_t
    sin += batch * sin_b + token * sin_t
    cos1 = tl.load(cos + column, mask=inside).to(tl.float32)
    cos2 = tl.load(cos + half + column, mask=inside).to(tl.float32)
    sin1 = tl.load(sin + column, mask=inside).to(tl.float32)
    sin2 = tl.load(sin + half + column, mask=inside).to(tl.float32)
    query += batch * query_b + token * query_t
    key += batch * key_b + token * key_t
    out_query += row * num_query_heads * half * 2
    out_key += row * num_key_heads * half * 2
    _turn_heads(
        query, out_query, query_h, half * 2, cos1, cos2, sin1, sin2, num_query_heads, half, BACK, QUERY_HEADS, HALF
    )
    _turn_heads(key, out_key, key_h, half * 2, cos1, cos2, sin1, sin2, num_key_heads, half, BACK, KEY_HEADS, HALF)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[_grid(out)](gate, up, out, out.numel(), BLOCK=_BLOCK)
    return out


def swiglu_backward_(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate``, in the place of ``grad``, and of ``up``."""
    assert grad.is_contiguous()
    gate, up = gate.contiguous(), up.contiguous()
    grad_up = torch.empty_like(grad)
    with torch.cuda.device_of(gate):
        _swiglu_backward_kernel[_grid(grad)](gate, up, grad, grad_up, grad.numel(), BLOCK=_BLOCK)
    return grad, grad_up


def rotate_(out: tuple[Tensor, Tensor], heads: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, *, back: bool) -> None:
    """Queries and keys ``(B, H, T, E)`` turned into ``out``, which lies as ``(B, T, H, E)``."""
    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (*heads, cos, sin))
    num_batch, num_query_heads, num_tokens, width = query.shape
    strides = [x.stride(dim) if x.shape[dim] > 1 else 0 for x in (query, key) for dim in range(3)]
    strides += [x.stride(dim) if x.shape[dim] > 1 else 0 for x in (cos, sin) for dim in range(2)]
    if num_batch * num_tokens == 0:
        return
    with torch.cuda.device_of(query):
        _rotate_kernel[(num_batch * num_tokens,)](
            query, key, *out, cos, sin, num_tokens, width // 2, *strides, num_query_heads, key.shape[1],
            BACK=back, QUERY_HEADS=triton.next_power_of_2(num_query_heads),
            KEY_HEADS=triton.next_power_of_2(key.shape[1]), HALF=triton.next_power_of_2(width // 2),
        )  # fmt: skip


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)
