"""How A and B start: one function and one entry of ``INITIALIZERS`` each.

Only starts that leave the base as it is. Those that change it (PiSSA, OLoRA, ...) need an export of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from lit_lora.adapters.layers import LoRAEmbedding, LoRALayer


@torch.no_grad()
def kaiming(layer: LoRALayer) -> None:
    """Kaiming-uniform A, zero B (the reference implementation of arXiv:2106.09685); embeddings: see `_embedding`."""
    lora_A, lora_B = layer.factors()
    if isinstance(layer, LoRAEmbedding):
        _embedding(layer)
        return
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.zeros_(lora_B)


@torch.no_grad()
def gaussian(layer: LoRALayer) -> None:
    """A ~ N(0, 1/r^2), zero B, as PEFT; embeddings: see `_embedding`."""
    lora_A, lora_B = layer.factors()
    if isinstance(layer, LoRAEmbedding):
        _embedding(layer)
        return
    nn.init.normal_(lora_A, std=1 / layer.r)
    nn.init.zeros_(lora_B)


@torch.no_grad()
def random(layer: LoRALayer) -> None:
    """Both random, so that the adapter changes the output from the start: for tests."""
    lora_A, lora_B = layer.factors()
    if isinstance(layer, LoRAEmbedding):
        nn.init.normal_(lora_A)
        nn.init.normal_(lora_B)
        return
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))


INITIALIZERS: dict[bool | str, Callable[[LoRALayer], None]] = {True: kaiming, "gaussian": gaussian, False: random}
"""``LoRAConfig.init_lora_weights`` -> function that fills the layer's A and B."""


def _embedding(layer: LoRAEmbedding) -> None:
    """Zero A, normal B: the reverse of a linear layer, as the reference implementation does it."""
    nn.init.zeros_(layer.lora_embedding_A)
    nn.init.normal_(layer.lora_embedding_B)
