"""Fold adapters into the base weights, take them out again, or switch them off for a while.

Unmerging restores the saved original: adding and subtracting in floating point would not. A merged layer gets a new
weight parameter, so a tied layer (input embedding and output head) keeps its own values; the model's configuration is
then told that they are no longer tied, for ``save_pretrained`` to write both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lit_lora.adapters import base_weight
from lit_lora.adapters.layers import LoRALayer, LoRALinear, TrainableCopy, adapter_modules, lora_layers
from lit_lora.adapters.matching import some


@torch.no_grad()
def merge_lora(model: nn.Module, *, unload: bool = True) -> None:
    """Fold every adapter into the weight of its base layer, in place.

    The sum is taken in float32 or better and rounded once to the dtype of the base weight.

    Args:
        model: a model with adapters.
        unload: take the wrappers out, which leaves a plain model; trainable copies take the place of their originals.
            Otherwise the wrappers stay for :func:`unmerge_lora`, with a second copy of each adapted weight.

    Raises:
        ValueError: if there is no adapter, it is merged already, a base layer is quantized, or an adapter holds NaN or
            infinity. The model is then unchanged.
    """
    modules = dict(adapter_modules(model))
    if not modules:
        raise ValueError("the model has no adapters to merge")
    layers = {name: module for name, module in modules.items() if isinstance(module, LoRALayer)}
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged and not unload:
        raise ValueError(f"{some(merged)} are merged already: call unmerge_lora first")
    to_merge = {name: layer for name, layer in layers.items() if not layer.merged}
    _check_mergeable(to_merge)
    for name, layer in to_merge.items():
        _merge_layer(layer)
        if unload:
            model.set_submodule(name, layer.base_layer)
    if not unload:
        return
    for name, module in modules.items():
        if isinstance(module, TrainableCopy):
            model.set_submodule(name, _plain_copy(module))
        elif module.merged:
            model.set_submodule(name, module.base_layer)
    _untie_if_diverged(model)


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo ``merge_lora(model, unload=False)``: every base weight is again what it was, bit for bit.

    Raises:
        ValueError: if no adapter is merged.
    """
    merged = [layer for _, layer in lora_layers(model) if layer.original_weight is not None]
    if not merged:
        raise ValueError("no adapter is merged: nothing to undo (after unload=True there is no way back)")
    for layer in merged:
        assert layer.original_weight is not None
        (original,) = layer.original_weight
        device = layer.base_layer.weight.device
        # The model may have moved since; the tuple did not move along.
        layer.base_layer.weight = (
            original if original.device == device else nn.Parameter(original.to(device), requires_grad=False)
        )
        layer.original_weight = None


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as without adapters and trained copies.

    Raises:
        ValueError: if the adapters are merged into the base weights, where they cannot be switched off.
    """
    modules = [module for _, module in adapter_modules(model)]
    if any(isinstance(module, LoRALayer) and module.merged for module in modules):
        raise ValueError("the adapters are merged: call unmerge_lora before disable_lora")
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def _check_mergeable(layers: dict[str, LoRALayer]) -> None:
    quantized = [
        name
        for name, layer in layers.items()
        if isinstance(layer, LoRALinear) and base_weight.is_quantized(layer.base_layer)
    ]
    if quantized:
        raise ValueError(
            f"cannot merge into the quantized weights of {some(quantized)}: rounding them again would lose most of the "
            "adapter. Save the adapter and run `lit-lora merge`, or load the base model in 16 bits, load_adapter, and "
            "merge there"
        )
    broken = [name for name, layer in layers.items() if not all(torch.isfinite(f).all() for f in layer.factors())]
    if broken:
        raise ValueError(f"the adapter holds NaN or infinity in {some(broken)}: it is not merged")


def _merge_layer(layer: LoRALayer) -> None:
    """Give the base layer ``W + delta``; the wrapper keeps the old weight."""
    base = layer.base_layer
    layer.original_weight = (base.weight,)
    delta = layer.delta_weight()
    if isinstance(layer, LoRALinear):
        base_weight.write_weight_(base, base_weight.read_weight(base) + delta)  # promotes to the wider dtype
    else:
        base.weight = nn.Parameter((base.weight + delta).to(base.weight.dtype), requires_grad=False)


def _plain_copy(wrapper: TrainableCopy) -> nn.Module:
    """The trained module, frozen, in the dtypes of the original."""
    for ours, original in zip(wrapper.copy.modules(), wrapper.base_layer.modules(), strict=True):
        for name, parameter in original.named_parameters(recurse=False):
            trained = getattr(ours, name)
            setattr(ours, name, nn.Parameter(trained.to(parameter.dtype), requires_grad=False))
    return wrapper.copy


def _untie_if_diverged(model: Any) -> None:
    """Correct what a transformers model says about tied weights, where merging has separated them."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return
    config.tie_word_embeddings = False
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    text_config.tie_word_embeddings = False
    model.all_tied_weights_keys = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if model.get_parameter(target) is model.get_parameter(source)
    }
