"""Causal attention over a packed batch on a CPU: one autograd function, a block of queries at a time.

torch's CPU kernel works on one example, wants key and value heads repeated, and runs at about a quarter of the speed
of a matrix product. Here the query heads that share a key head are stacked into one product, keys that a block cannot
see are never touched, and results go straight to where the next layer reads them. The backward pass makes the
attention weights again, as FlashAttention (arXiv:2205.14135) does, so nothing but the inputs is kept.

The readable reference is the other branch of ``attention.packed_attention_forward``. Left out: dropout, sliding
windows, soft-capped scores, half precision; that branch serves them.

Shapes: T rows of the batch, H query heads, K key and value heads, G = H / K, E head dimension, B queries of a block,
C keys that the block sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONG = 768
"""From so many tokens of an example on, torch's own kernel is faster (``benchmarks/NOTES.md``)."""

_BLOCK = 128
"""Queries of a block: fewer waste less of the diagonal block, more make larger products."""


class _Block(NamedTuple):
    """Queries that are computed together, and the keys that the last of them sees."""

    query_rows: slice
    key_rows: slice
    """Of the block's own example."""
    prefix: int
    """Rows at the start of the batch that are seen too."""


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: list[int], *, shared_prefix: int = 0, scaling: float
) -> Tensor:
    """Attention of packed examples, each token to itself and the tokens of its example before it.

    Args:
        query: ``(1, H, T, E)``, float32 or float64.
        key: ``(1, K, T, E)``.
        value: ``(1, K, T, E)``.
        seq_lens: rows of each example, in order; they add up to T.
        shared_prefix: the first entry of ``seq_lens`` has this many rows and is the beginning of every other example;
            0 if examples share none.
        scaling: factor on the scores.

    Returns:
        ``(1, T, H, E)``, contiguous.
    """
    return _BlockwiseAttention.apply(query, key, value, seq_lens, shared_prefix, scaling)


def _blocks(seq_lens: list[int], shared_prefix: int) -> Iterator[_Block]:
    start = 0
    for index, length in enumerate(seq_lens):
        prefix = shared_prefix if index else 0
        for first in range(start, start + length, _BLOCK):
            last = min(first + _BLOCK, start + length)
            yield _Block(slice(first, last), slice(start, last), prefix)
        start += length


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seq_lens: list[int], shared_prefix: int, scaling: float
    ) -> Tensor:
        _, num_heads, num_rows, width = query.shape
        out_THE = query.new_empty(num_rows, num_heads, width)
        for block in _blocks(seq_lens, shared_prefix):
            stacked = _stack(query[0], block, key.shape[1], scaling)
            weights = _weights(stacked, _visible(key[0], block), block)
            _unstack_(out_THE, block, weights @ _visible(value[0], block))
        ctx.save_for_backward(query, key, value)
        ctx.options = seq_lens, shared_prefix, scaling
        return out_THE[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = (x[0] for x in ctx.saved_tensors)
        seq_lens, shared_prefix, scaling = ctx.options
        num_heads, num_rows, width = query.shape
        num_key_heads = len(key)
        grad_HTE = grad[0].transpose(0, 1)
        # In the layout of the projections' outputs, which the caller transposed.
        dquery_THE = query.new_empty(num_rows, num_heads, width)
        dkey, dvalue = (x.new_zeros(num_rows, num_key_heads, width).transpose(0, 1) for x in (key, value))
        for block in _blocks(seq_lens, shared_prefix):
            stacked, dout = _stack(query, block, num_key_heads, scaling), _stack(grad_HTE, block, num_key_heads)
            seen = _visible(key, block)
            weights = _weights(stacked, seen, block)
            dweights = dout @ _visible(value, block).transpose(1, 2)
            _add_visible_(dvalue, block, weights.transpose(1, 2) @ dout)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            _unstack_(dquery_THE, block, (dscores @ seen).mul_(scaling))
            _add_visible_(dkey, block, dscores.transpose(1, 2) @ stacked)
        return dquery_THE.transpose(0, 1)[None], dkey[None], dvalue[None], None, None, None


def _stack(x_HTE: Tensor, block: _Block, num_key_heads: int, scaling: float = 1.0) -> Tensor:
    """Rows of a block, those of query heads with one key head below each other: ``(K, G * B, E)``, scaled."""
    rows_HBE = x_HTE[:, block.query_rows]
    stacked = rows_HBE.new_empty(rows_HBE.shape)
    torch.mul(rows_HBE, scaling, out=stacked)
    return stacked.view(num_key_heads, -1, stacked.shape[-1])


def _unstack_(out_THE: Tensor, block: _Block, stacked: Tensor) -> None:
    _, num_heads, width = out_THE.shape
    out_THE[block.query_rows] = stacked.view(num_heads, -1, width).transpose(0, 1)


def _visible(x_KTE: Tensor, block: _Block) -> Tensor:
    """Keys or values that a block sees, ``(K, C, E)``."""
    own = x_KTE[:, block.key_rows]
    return torch.cat([x_KTE[:, : block.prefix], own], dim=1) if block.prefix else own


def _add_visible_(total_KTE: Tensor, block: _Block, grad_KCE: Tensor) -> None:
    if block.prefix:
        total_KTE[:, : block.prefix] += grad_KCE[:, : block.prefix]
    total_KTE[:, block.key_rows] += grad_KCE[:, block.prefix :]


def _weights(stacked: Tensor, keys_KCE: Tensor, block: _Block) -> Tensor:
    """Attention weights of a block, ``(K, G * B, C)``; only the last B columns can be hidden from a query."""
    scores = stacked @ keys_KCE.transpose(1, 2)
    size = block.query_rows.stop - block.query_rows.start
    hidden_BB = torch.full((size, size), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores.view(len(scores), -1, size, scores.shape[-1])[..., -size:] += hidden_BB
    return torch.softmax(scores, dim=-1)
