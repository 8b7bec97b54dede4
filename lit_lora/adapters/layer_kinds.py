"""Which adapter a layer gets: one row for each kind of layer, whose classes say what they hold and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from lit_lora.adapters.convolution import DoRAConv, LoRAConv, is_convolution
from lit_lora.adapters.dora import DoRAEmbedding, DoRALinear
from lit_lora.adapters.layers import LoRAEmbedding, LoRALayer, LoRALinear
from lit_lora.adapters.packed_attention import LoRAAttention, is_packed_attention
from lit_lora.adapters.subtracted_start import StartedLinear
from lit_lora.base import base_weight
from lit_lora.config import OF_THE_WEIGHT, LoRAConfig


class LayerKind(NamedTuple):
    """Layers that are adapted in one way."""

    names: str
    """Of their classes, for messages."""
    holds: Callable[[nn.Module], bool]
    """Whether a module is one of them."""
    plain: type[LoRALayer]
    dora: type[LoRALayer] | None = None
    """None where there is none."""
    started: type[LoRALayer] | None = None
    """Of an adapter that starts as a part of the weight."""


KINDS = (
    LayerKind("nn.Embedding", lambda module: isinstance(module, nn.Embedding), LoRAEmbedding, DoRAEmbedding),
    LayerKind("nn.Conv1d, nn.Conv2d, nn.Conv3d", is_convolution, LoRAConv, DoRAConv),
    LayerKind("nn.MultiheadAttention", is_packed_attention, LoRAAttention),
    LayerKind(
        "nn.Linear, Conv1D of transformers, and Linear4bit and Linear8bitLt of bitsandbytes",
        base_weight.is_linear_like,
        LoRALinear,
        DoRALinear,
        StartedLinear,
    ),
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """None for what cannot be adapted."""
    return next((kind for kind in KINDS if kind.holds(module)), None)


def wrapper_for(module: nn.Module, config: LoRAConfig) -> type[LoRALayer]:
    """The class of the adapter around a layer.

    Raises:
        ValueError: if there is none for this configuration.
    """
    kind = kind_of(module)
    assert kind is not None, "what cannot be adapted is refused where it is matched"
    if config.init_lora_weights in OF_THE_WEIGHT:
        return kind.started or kind.plain
    if not config.use_dora:
        return kind.plain
    if kind.dora is None:
        raise ValueError(f"use_dora is not for {kind.names}, in PEFT either: leave it out")
    return kind.dora
