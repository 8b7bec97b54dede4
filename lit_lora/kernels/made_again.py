"""Has a compiler make a tensor again in the backward pass, where it would keep that of the forward pass.

torch.compile sees both passes of a layer at once: a weight that is dequantized in each of them is the same operation on
the same input, so it would be made once and kept between them, and 4 bits would take the memory of 32. An input that
comes through :func:`after` a gradient exists in the backward pass only, and so does all that is made from it.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lit_lora::after", mutates_args=())
def after(tensor: Tensor, other: Tensor) -> Tensor:
    """A copy of ``tensor``, made once ``other`` is there."""
    return tensor.clone()


@after.register_fake
def _(tensor: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(tensor)
