"""What a CUDA card can do, by its compute capability: 7.5 is a T4, 8.0 an A100, 8.9 an L4 or RTX 4090, 9.0 an H100.

Asked of the card, not of torch: ``torch.cuda.is_bf16_supported()`` is true for a T4, which computes bfloat16 by
detours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from lit_lora.kernels.cuda_stand_ins import is_on_cuda
from lit_lora.kernels.cuda_way import HALF

_AMPERE = (8, 0)
"""The first with bfloat16 and with FlashAttention (arXiv:2307.08691)."""

STAND_IN = _AMPERE
"""What tensors that stand for CUDA's are on: Ampere, and all after it in what is asked here."""

_assumed: tuple[int, int] | None = None


def capability(where: Tensor | torch.device) -> tuple[int, int] | None:
    """Of the card that a tensor is on, or stands for being on; None where there is none."""
    device = where.device if isinstance(where, Tensor) else where
    if device.type == "cuda" and torch.cuda.is_available():
        return _of_card(torch.cuda.current_device() if device.index is None else device.index)
    if isinstance(where, Tensor) and is_on_cuda(where):
        return STAND_IN
    return _assumed


@cache
def _of_card(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@contextmanager
def assumed(card: tuple[int, int] | None) -> Iterator[None]:
    """Within, tensors on a CPU take the ways of a card of this capability: to test these ways without a card."""
    global _assumed
    before, _assumed = _assumed, card
    try:
        yield
    finally:
        _assumed = before


def half_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the card computes in it, else float16. Where there is no card to ask, bfloat16."""
    card = capability(device)
    return torch.bfloat16 if card is None or card >= _AMPERE else torch.float16


def has_flash_attention(query: Tensor) -> bool:
    """Whether torch's FlashAttention takes such heads, ``(..., E)``, forward and backward."""
    card = capability(query)
    if card is None or card < _AMPERE or query.dtype not in HALF or query.shape[-1] > 256:
        return False
    # Without it were built some wheels for Windows.
    return not query.is_cuda or torch.backends.cuda.is_flash_attention_available()


def prepare_attention(device: torch.device) -> None:
    """Leave cuDNN out of ``scaled_dot_product_attention``, for the whole process. Does nothing for another device.

    torch prefers it on Hopper and Blackwell, and there it builds a plan for each new shape: half a second, forward and
    backward, for shapes that are new with nearly every batch of natural lengths. FlashAttention needs none. With fewer
    than 8 key heads it also gave wrong results on Blackwell (https://github.com/pytorch/pytorch/issues/193893).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
