"""Give a model without values its values, a module at a time, each quantized and cut before the next one comes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_lora.base.base_weight import is_linear_like
from lit_lora.base.freed_memory import return_freed_memory
from lit_lora.base.quantize import is_left_plain, quantized_layer
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.base.shards import Sharding
from lit_lora.config import QuantizationConfig

Values = Callable[[str, nn.Module, PreTrainedModel, torch.device], None]
"""Gives a module's own tensors their values, whole: its name, the module, the model of transformers that it is a part
of, and where the model is to be. Parameters may have another dtype and lie elsewhere, such as in a file."""


def fill_(
    model: PreTrainedModel,
    values: Values,
    *,
    device: torch.device,
    quantization: QuantizationConfig | None = None,
    sharding: Sharding | None = None,
) -> None:
    """Give every tensor of ``model`` memory and values, in place, from the inside out.

    Args:
        model: on the meta device.
        values: where they come from.
        device: where to.
        quantization: how to quantize the linear layers; the rest of it, :func:`finish_quantization_` does.
        sharding: keep this process's share of each weight before the next one comes. Those outside of the decoder
            layers are then cut, and it is for the caller to call ``shard_``.
    """
    layers = {id(layer) for layer in repeated_layers(model)}

    def filled(module: nn.Module, name: str, owner: PreTrainedModel) -> nn.Module:
        for child_name, child in list(module.named_children()):
            inner = child if isinstance(child, PreTrainedModel) else owner
            done = filled(child, f"{name}.{child_name}" if name else child_name, inner)
            if done is not child:
                setattr(module, child_name, done)
        dtypes = {key: parameter.dtype for key, parameter in module.named_parameters(recurse=False)}
        values(name, module, owner, device)
        if quantization is not None and is_linear_like(module) and not is_left_plain(name, quantization):
            _move_(module, device, dtypes)
            module, dtypes = quantized_layer(name, module, quantization), {}
        if sharding is None:
            _move_(module, device, dtypes)
            return module
        sharding.cut_(module, device, dtypes)
        if id(module) in layers:
            sharding.shard_layer_(module)
        return_freed_memory()
        return module

    filled(model, "", model)


def _move_(module: nn.Module, device: torch.device, dtypes: dict[str, torch.dtype]) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        parameter.data = parameter.data.to(device, dtypes.get(key, parameter.dtype))


def random_values(name: str, module: nn.Module, owner: PreTrainedModel, device: torch.device) -> None:
    """As the model's own code starts it."""
    module.to_empty(device=device, recurse=False)
    owner._init_weights(module)
