"""Give a model without values its values, a layer at a time, each quantized before the next one comes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_lora.base.base_weight import is_linear_like
from lit_lora.base.quantize import is_left_plain, quantized_layer
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.config import QuantizationConfig

Values = Callable[[str, nn.Module, PreTrainedModel], None]
"""Gives a module's own tensors their values: its name, the module, the model of transformers that it is a part of."""


def fill_(
    model: PreTrainedModel,
    values: Values,
    *,
    device: torch.device,
    quantization: QuantizationConfig | None = None,
    layer_done: Callable[[nn.Module], object] | None = None,
) -> None:
    """Give every tensor of ``model`` memory and values, in place, from the inside out.

    Args:
        model: on the meta device.
        values: where they come from.
        device: where to.
        quantization: how to quantize the linear layers; the rest of it, :func:`finish_quantization_` does.
        layer_done: called with each decoder layer once all of it has its values.
    """
    layers = {id(layer) for layer in repeated_layers(model)}

    def done(module: nn.Module) -> None:
        if layer_done is not None and id(module) in layers:
            layer_done(module)

    fill_part_(model, "", model, values, device=device, quantization=quantization, done=done)


def random_values(name: str, module: nn.Module, owner: PreTrainedModel) -> None:
    """As the model's own code starts it."""
    owner._init_weights(module)


def fill_part_(
    module: Any,
    name: str,
    owner: PreTrainedModel,
    values: Values,
    *,
    device: torch.device,
    quantization: QuantizationConfig | None = None,
    done: Callable[[nn.Module], object] = lambda module: None,
    left_out: Collection[int] = (),
) -> None:
    """Give a part of a model its values, as :func:`fill_`.

    Args:
        module: the part.
        name: of it in the model.
        owner: the model of transformers that it is a part of.
        values: as there, and all that follows.
        device: where to.
        quantization: how to quantize.
        done: called with each module in it once that has its values.
        left_out: ``id`` of modules that get none.
    """
    for child_name, child in list(module.named_children()):
        if id(child) in left_out:
            continue
        path = f"{name}.{child_name}" if name else child_name
        inner = child if isinstance(child, PreTrainedModel) else owner
        fill_part_(
            child,
            path,
            inner,
            values,
            device=device,
            quantization=quantization,
            done=done,
            left_out=left_out,
        )
        if quantization is not None and is_linear_like(child) and not is_left_plain(path, quantization):
            child = quantized_layer(path, child, quantization)
            setattr(module, child_name, child)
        done(child)
    module.to_empty(device=device, recurse=False)
    values(name, module, owner)
