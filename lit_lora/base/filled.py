"""Give a model without values its values, a module at a time, each quantized and cut before the next one comes."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_lora.base.base_weight import is_linear_like
from lit_lora.base.expert_codes import quantize_experts_
from lit_lora.base.freed_memory import return_freed_memory
from lit_lora.base.left_plain import is_left_plain
from lit_lora.base.quantize import quantized_layer
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
        quantization: how to quantize linear layers, and experts where no shares are kept; the rest of it,
            :func:`finish_quantization_` does.
        sharding: keep this process's share of each weight before the next one comes. Those outside of the decoder
            layers are then cut, and it is for the caller to call ``shard_``.
    """
    layers = {id(layer) for layer in repeated_layers(model)}

    def keep_share(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
        assert sharding is not None
        sharding.cut_(module, device, dtypes)
        if id(module) in layers:
            sharding.shard_layer_(module)
        return_freed_memory()

    kept = None if sharding is None else keep_share
    fill_part_(model, "", model, values, device=device, quantization=quantization, keep=kept)


def fill_part_(
    module: nn.Module,
    name: str,
    owner: PreTrainedModel,
    values: Values,
    *,
    device: torch.device,
    quantization: QuantizationConfig | None = None,
    keep: Callable[[nn.Module, dict[str, torch.dtype]], None] | None = None,
    left_out: Collection[int] = (),
) -> nn.Module:
    """Give a part of a model its values, from the inside out.

    Args:
        module: the part.
        name: of it in the model.
        owner: the model of transformers that it is a part of.
        values: where they come from.
        device: where to.
        quantization: how to quantize linear layers and fused experts.
        keep: what to do with a module once it has its values, and with the dtypes that its parameters are to have; by
            default they are moved as they are.
        left_out: ``id`` of modules that get none.

    Returns:
        The part, or its quantized layer.
    """
    for child_name, child in list(module.named_children()):
        if id(child) in left_out:
            continue
        done = fill_part_(
            child,
            f"{name}.{child_name}" if name else child_name,
            child if isinstance(child, PreTrainedModel) else owner,
            values,
            device=device,
            quantization=quantization,
            keep=keep,
            left_out=left_out,
        )
        if done is not child:
            setattr(module, child_name, done)
    dtypes = {key: parameter.dtype for key, parameter in module.named_parameters(recurse=False)}
    values(name, module, owner, device)
    if quantization is not None and is_linear_like(module) and not is_left_plain(name, quantization):
        _move_(module, device, dtypes)
        module, dtypes = quantized_layer(name, module, quantization), {}
    if keep is None:
        _move_(module, device, dtypes)
        if quantization is not None:
            quantize_experts_(name, module, quantization)
    else:
        keep(module, dtypes)
    return module


def _move_(module: nn.Module, device: torch.device, dtypes: dict[str, torch.dtype]) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta:  # tied to another module's, which is found there
            continue
        parameter.data = parameter.data.to(device, dtypes.get(key, parameter.dtype))


def random_values(name: str, module: nn.Module, owner: PreTrainedModel, device: torch.device) -> None:
    """As the model's own code starts it."""
    module.to_empty(device=device, recurse=False)
    owner._init_weights(module)
