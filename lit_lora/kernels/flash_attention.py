"""Causal attention over a packed batch on a CPU in full precision: torch's own kernel, an example at a time.

It computes as FlashAttention does (arXiv:2205.14135), and blocks of all heads side by side. Query heads that share a
key head are its heads, and the key heads its batch, so that keys and values are read in place and not repeated. Of the
forward pass only the logarithms of the softmax's sums are kept beside inputs and output, and the output is kept by the
layer that reads it too.

A common beginning of the examples is computed with each of them again, and its results are left out: few rows, that
see few. ``blockwise_attention.py`` is the faster one in bfloat16, and on AMD for long examples.

Shapes: T rows of the batch, H query heads, K key and value heads, G = H / K, E head dimension, L rows of an example and
of the beginning that it sees.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_lora.kernels.packed_rows import Example, examples

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, seq_lens: list[int], *, shared_prefix: int = 0, scaling: float
) -> Tensor:
    """What :func:`lit_lora.kernels.blockwise_attention.blockwise_attention` gives, of float32 or float64."""
    query, key, value = map(_with_rows_in_one_piece, (query, key, value))
    return _FlashAttention.apply(query, key, value, seq_lens, shared_prefix, scaling)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, seq_lens: list[int], shared_prefix: int, scaling: float
    ) -> Tensor:
        _, num_heads, num_rows, width = query.shape
        num_key_heads = key.shape[1]
        out = query.new_empty(1, num_rows, num_heads, width)
        log_sums = []
        for example in examples(seq_lens, shared_prefix):
            queries = _of_queries(example.whole(query[0]), num_key_heads)
            keys, values = (_of_keys(example.whole(x[0]), num_heads // num_key_heads) for x in (key, value))
            attended, log_sum = _forward(queries, keys, values, 0.0, True, scale=scaling)
            _put_(out[0], example, attended)
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.options = seq_lens, shared_prefix, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *log_sums = ctx.saved_tensors
        query, key, value, out_THE = query[0], key[0], value[0], out[0]
        seq_lens, shared_prefix, scaling = ctx.options
        num_heads, num_rows, width = query.shape
        num_key_heads = len(key)
        # In the layout of the projections' outputs, which the caller transposed.
        dquery_THE = query.new_empty(num_rows, num_heads, width)
        dkey_KTE, dvalue_KTE = (query.new_zeros(num_rows, num_key_heads, width).transpose(0, 1) for _ in range(2))
        grad_THE = _with_rows_in_one_piece(grad)[0]
        of_queries = (query, out_THE.transpose(0, 1), grad_THE.transpose(0, 1))
        for example, log_sum in zip(examples(seq_lens, shared_prefix), log_sums, strict=True):
            queries, attended, dattended = (_of_queries(example.whole(x), num_key_heads) for x in of_queries)
            if example.prefix:  # then it is a copy
                dattended[:, :, : example.prefix] = 0
            keys, values = (_of_keys(example.whole(x), num_heads // num_key_heads) for x in (key, value))
            dqueries, dkeys, dvalues = _backward(
                dattended, queries, keys, values, attended, log_sum, 0.0, True, scale=scaling
            )
            _put_(dquery_THE, example, dqueries)
            example.add_(dkey_KTE, dkeys.sum(1))
            example.add_(dvalue_KTE, dvalues.sum(1))
        dquery = dquery_THE.transpose(0, 1)[None]
        return dquery, dkey_KTE[None], dvalue_KTE[None], None, None, None


def _with_rows_in_one_piece(x: Tensor) -> Tensor:
    """The kernel reads the numbers of a head as if they lay next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_queries(x_HLE: Tensor, num_key_heads: int) -> Tensor:
    return x_HLE.unflatten(0, (num_key_heads, -1))


def _of_keys(x_KLE: Tensor, group: int) -> Tensor:
    """For each query head of a group."""
    return x_KLE[:, None].expand(-1, group, -1, -1)


def _put_(out_THE: Tensor, example: Example, x_KGLE: Tensor) -> None:
    """Give the example's own rows what was computed for them."""
    own = x_KGLE[:, :, example.prefix :]
    out_THE[example.rows].unflatten(1, own.shape[:2]).copy_(own.permute(2, 0, 1, 3))
