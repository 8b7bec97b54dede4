"""LoRA-FA (arXiv:2308.03303): A stays as it starts, and B alone is trained. A checkpoint holds both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from lit_lora.adapters.layers import LoRALinear, lora_layers
from lit_lora.adapters.subtracted_start import start_tensors


class FixedHalf(NamedTuple):
    """A layer of which only B is trained."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float


def fixed_halves(model: nn.Module) -> list[FixedHalf]:
    """Those of a model, in its order."""
    return [FixedHalf(*layer.factors(), layer.scaling) for _, layer in _fixed(model)]


def untrained_tensors(model: Any) -> dict[str, Tensor]:
    """What an adapter consists of beside what is trained: A that stays as it is, and starts that are taken off."""
    fixed = {f"{name}.{layer.tensor_names[0]}": layer.factors()[0].detach() for name, layer in _fixed(model)}
    return fixed | start_tensors(model)


def _fixed(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    for name, layer in lora_layers(model):
        if isinstance(layer, LoRALinear) and not layer.factors()[0].requires_grad and layer.factors()[1].requires_grad:
            yield name, layer
