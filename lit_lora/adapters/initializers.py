"""How A and B start: one function and one entry of ``INITIALIZERS`` each.

Only starts that leave the base as it is. Those that change it (PiSSA, OLoRA, ...) need an export of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lit_lora.adapters.layers import LoRALayer


@torch.no_grad()
def kaiming(layer: LoRALayer) -> None:
    """Kaiming-uniform A, zero B (the reference implementation of arXiv:2106.09685)."""
    layer.start(lambda half: nn.init.kaiming_uniform_(half, a=math.sqrt(5)))


@torch.no_grad()
def gaussian(layer: LoRALayer) -> None:
    """A ~ N(0, 1/r^2), zero B, as PEFT."""
    layer.start(lambda half: nn.init.normal_(half, std=1 / layer.r))


@torch.no_grad()
def random(layer: LoRALayer) -> None:
    """Both random, so that the adapter changes the output from the start: for tests."""
    layer.start_at_random()


INITIALIZERS: dict[bool | str, Callable[[LoRALayer], None]] = {True: kaiming, "gaussian": gaussian, False: random}
"""``LoRAConfig.init_lora_weights`` -> function that fills the layer's A and B."""
