"""Causal attention over a packed batch on a CPU: one autograd function, a block of queries at a time.

For bfloat16, and for long examples on AMD, where torch's kernel (``flash_attention.py``) is slower. Query heads that
share a key head are stacked into one product, keys that a block cannot see are never touched, and results go straight
to where the next layer reads them. The backward pass makes the attention weights again, as FlashAttention
(arXiv:2205.14135) does, so nothing but the inputs is kept. In bfloat16 products are taken so, the softmax and the sums
over blocks in float32.

The readable reference is the other branch of ``attention.packed_attention_forward``. Left out: dropout, sliding
windows, soft-capped scores, float16; that branch serves them.

Shapes: T rows of the batch, H query heads, K key and value heads, G = H / K, E head dimension, B queries of a block,
C keys that the block sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lit_lora.kernels import products
from lit_lora.kernels.packed_rows import Example, examples

_LONG = 768
"""From so many tokens of an example on, torch's own kernel is faster than products by MKL (``benchmarks/NOTES.md``)."""

_BLOCK = 128
"""Queries of a block: fewer waste less of the diagonal block, more make larger products."""

_ONE_BY_ONE = 512
"""Keys from which on the key heads of a block are computed one after the other."""


def is_faster(longest: int, dtype: torch.dtype) -> bool:
    """Than torch's kernel, for examples of at most so many tokens: for long ones by oneDNN, for others in bfloat16."""
    return products.onednn_is_faster() if longest >= _LONG else dtype is torch.bfloat16


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: list[int], *, shared_prefix: int = 0, scaling: float
) -> Tensor:
    """Attention of packed examples, each token to itself and the tokens of its example before it.

    Args:
        query: ``(1, H, T, E)``, bfloat16, float32 or float64.
        key: ``(1, K, T, E)``.
        value: ``(1, K, T, E)``.
        seq_lens: rows of each example, in order; they add up to T.
        shared_prefix: the first entry of ``seq_lens`` has this many rows and is the beginning of every other example;
            0 if examples share none.
        scaling: factor on the scores.

    Returns:
        ``(1, T, H, E)``, contiguous; can be differentiated once.
    """
    return _BlockwiseAttention.apply(query, key, value, seq_lens, shared_prefix, scaling)


def _blocks(example: Example) -> Iterator[tuple[slice, int]]:
    """Rows of queries that are computed together, and how many keys of the example the last of them sees."""
    for first in range(example.rows.start, example.rows.stop, _BLOCK):
        last = min(first + _BLOCK, example.rows.stop)
        yield slice(first, last), example.prefix + last - example.rows.start


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seq_lens: list[int], shared_prefix: int, scaling: float
    ) -> Tensor:
        _, num_heads, num_rows, width = query.shape
        out_THE = query.new_empty(num_rows, num_heads, width)
        hidden = _hidden_keys(query, seq_lens)
        for example in examples(seq_lens, shared_prefix):
            keys, values = (example.whole(x[0]).contiguous() for x in (key, value))
            wide_keys = keys.to(hidden.dtype)
            for rows, num_seen in _blocks(example):
                stacked = _stack(query[0, :, rows], len(keys), scaling)
                for heads in _together(len(keys), num_seen):
                    weights = _weights(stacked[heads], wide_keys[heads, :num_seen], rows, hidden).to(query.dtype)
                    _unstack_(out_THE[rows], heads, products.matmul(weights, values[heads, :num_seen]))
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
        hidden = _hidden_keys(query, seq_lens)
        wide = hidden.dtype
        dkey, dvalue = (torch.zeros((num_rows, num_key_heads, width), dtype=wide).transpose(0, 1) for _ in range(2))
        for example in examples(seq_lens, shared_prefix):
            keys, values = (example.whole(x).contiguous() for x in (key, value))
            wide_keys = keys.to(wide)
            # With the keys as columns: a product with many columns is the faster one.
            dkeys_KEC, dvalues_KEC = (
                torch.zeros_like(x.transpose(1, 2), dtype=wide, memory_format=torch.contiguous_format)
                for x in (keys, values)
            )
            for rows, num_seen in _blocks(example):
                stacked, dout = _stack(query[:, rows], num_key_heads, scaling), _stack(grad_HTE[:, rows], num_key_heads)
                for heads in _together(num_key_heads, num_seen):
                    seen = keys[heads, :num_seen]
                    weights = _weights(stacked[heads], wide_keys[heads, :num_seen], rows, hidden)
                    dweights = products.matmul(dout[heads], values[heads, :num_seen].transpose(1, 2)).to(wide)
                    dvalues_KEC[heads, :, :num_seen] += products.matmul(
                        dout[heads].transpose(1, 2), weights.to(query.dtype)
                    )
                    dscores = torch._softmax_backward_data(dweights, weights, -1, wide).to(query.dtype)
                    _unstack_(dquery_THE[rows], heads, products.matmul(dscores, seen).mul_(scaling))
                    dkeys_KEC[heads, :, :num_seen] += products.matmul(stacked[heads].transpose(1, 2), dscores)
            example.add_(dkey, dkeys_KEC.transpose(1, 2))
            example.add_(dvalue, dvalues_KEC.transpose(1, 2))
        dkey, dvalue = dkey.to(query.dtype), dvalue.to(query.dtype)
        return dquery_THE.transpose(0, 1)[None], dkey[None], dvalue[None], None, None, None


def _together(num_key_heads: int, num_seen: int) -> Iterator[slice]:
    """Key heads in one go: all, or one where a block's weights are large, so that they stay in the cache."""
    size = num_key_heads if num_seen < _ONE_BY_ONE else 1
    for first in range(0, num_key_heads, size):
        yield slice(first, first + size)


def _stack(x_HBE: Tensor, num_key_heads: int, scaling: float = 1.0) -> Tensor:
    """Rows of a block, those of query heads with one key head below each other: ``(K, G * B, E)``, scaled."""
    stacked = x_HBE.new_empty(x_HBE.shape)
    torch.mul(x_HBE, scaling, out=stacked)
    return stacked.view(num_key_heads, -1, stacked.shape[-1])


def _unstack_(out_BHE: Tensor, key_heads: slice, stacked: Tensor) -> None:
    """Give the query heads of some key heads their rows: the reverse of ``_stack``."""
    size, _, width = out_BHE.shape
    own = stacked.view(-1, size, width)
    group = len(own) // len(stacked)
    first = key_heads.start * group
    out_BHE[:, first : first + len(own)].copy_(own.transpose(0, 1))


def _weights(stacked: Tensor, wide_keys_KCE: Tensor, rows: slice, hidden_BB: Tensor) -> Tensor:
    """Attention weights of a block, ``(K, G * B, C)``, in the type of the keys, which is not below float32."""
    columns_KEC = wide_keys_KCE.transpose(1, 2)
    if stacked.dtype is columns_KEC.dtype:
        scores = products.matmul(stacked, columns_KEC)
    else:  # a score of 20 is off by 0.06 where it is rounded to bfloat16, and its weight by 6 %
        scores = torch.bmm(stacked.to(columns_KEC.dtype), columns_KEC)
    size = rows.stop - rows.start
    scores.view(len(scores), -1, size, scores.shape[-1])[..., -size:] += hidden_BB[:size, :size]
    return torch.softmax(scores, dim=-1)


def _hidden_keys(query: Tensor, seq_lens: list[int]) -> Tensor:
    """What is added to the scores of a block with its own keys: minus infinity for those after each query, ``(B, B)``.

    Of the other keys that a block sees none is hidden from its queries.
    """
    size, wide = min(_BLOCK, max(seq_lens)), torch.promote_types(query.dtype, torch.float32)
    return query.new_full((size, size), float("-inf"), dtype=wide).triu_(1)
