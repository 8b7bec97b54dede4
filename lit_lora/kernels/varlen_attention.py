"""Causal attention over a packed batch on CUDA: torch's variable-length attention, one launch for all examples.

Its arguments differ by torch version (2.11 has no ``enable_gqa``, and takes fewer key heads as they are), so they are
asked for once; what a version cannot be told, it does not serve. Whether it serves a call is told before it is made: an
error of the kernel is then one of ours, and is seen.

Shapes: T tokens of the batch, N examples, H query heads, K key and value heads, E head dimension.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import Tensor
from torch.nn.attention import varlen

from lit_lora.kernels.cuda_cards import has_flash_attention


def serves(query: Tensor, value: Tensor, *, scaling: float | None, window: int | None) -> bool:
    """Whether the kernel takes such a call: ``(1, H, T, E)`` and ``(1, K, T, E)``, without soft cap and dropout."""
    width = query.shape[-1]
    if value.shape[-1] != width or width % 8 or not has_flash_attention(query):
        return False
    windows = "window_size" in _parameters() or (window is None and "is_causal" in _parameters())
    return windows and ("scale" in _parameters() or scaling in (None, width**-0.5))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Attention of packed examples, each token to itself and the tokens of its example before it.

    Args:
        query: ``(1, H, T, E)``.
        key: ``(1, K, T, E)``.
        value: ``(1, K, T, E)``.
        offsets: where examples start and end, ``(N + 1,)`` int32.
        longest: tokens of the longest example, or more.
        scaling: factor on the scores; 1/sqrt(E) by default.
        window: tokens that a token sees, itself included; None for all.

    Returns:
        ``(1, T, H, E)``.
    """
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (query, key, value))
    wanted: dict[str, Any] = {
        "window_size": (-1 if window is None else window - 1, 0),  # a window of w tokens reaches w - 1 to the left
        "is_causal": True,
        "scale": scaling,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    known = {name: value for name, value in wanted.items() if name in _parameters()}
    out = varlen.varlen_attn(q, k, v, offsets, offsets, longest, longest, **known)
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


@cache
def _parameters() -> frozenset[str]:
    return frozenset(inspect.signature(varlen.varlen_attn).parameters)
