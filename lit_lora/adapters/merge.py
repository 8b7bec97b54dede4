"""Fold adapters into the base weights, take them out again, or switch them off for a while.

Unmerging restores the saved original: adding and subtracting in floating point would not. A merged layer gets a new
weight parameter, so a tied layer (input embedding and output head) keeps its own values; the model's configuration is
then told that they are no longer tied, for ``save_pretrained`` to write both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_lora.adapters.layers import LoRALayer, TrainableCopy, adapter_modules, lora_layers
from lit_lora.adapters.matching import some
from lit_lora.adapters.module_names import named_modules, replace_module, uncompiled
from lit_lora.adapters.named_adapters import active_adapters, forget_active
from lit_lora.adapters.trainable_tokens import TrainableTokens
from lit_lora.adapters.trained_biases import forget_biases, original_biases, trained_biases


@torch.no_grad()
def merge_lora(model: nn.Module, *, unload: bool = True) -> None:
    """Fold every adapter into the weight of its base layer, in place.

    The sum is taken in float32 or better and rounded once to the dtype of the base weight.

    Args:
        model: a model with adapters.
        unload: take the wrappers out, which leaves a plain model; trainable copies take the place of their originals.
            Otherwise the wrappers stay for :func:`unmerge_lora`, with a second copy of each adapted weight.

    Raises:
        ValueError: if there is no adapter, it is merged already, a base layer is quantized or does more with its weight
            than multiply, or base, adapter or their sum holds NaN or infinity. The model is then unchanged.
    """
    modules = dict(adapter_modules(model))
    if not modules:
        raise ValueError("the model has no adapters to merge")
    if len(active := active_adapters(model)) > 1:
        raise ValueError(f"adapters {active} are active: set_adapter one of them and merge it, then the next")
    layers = {name: module for name, module in modules.items() if isinstance(module, LoRALayer)}
    merged = [name for name, layer in layers.items() if layer.merged]
    to_merge = {name: layer for name, layer in layers.items() if not layer.merged}
    tokens = {name: module for name, module in modules.items() if isinstance(module, TrainableTokens)}
    merged += [name for name, module in tokens.items() if module.merged]
    copies = {name: module for name, module in modules.items() if isinstance(module, TrainableCopy)} if unload else {}
    _check_mergeable(to_merge)
    if merged and not unload:
        raise ValueError(f"{some(merged)} are merged already: call unmerge_lora first")
    _check_finite(to_merge, copies)
    biases = trained_biases(model)
    broken = [name for name, bias in biases.items() if not torch.isfinite(bias).all()]
    if broken:
        raise ValueError(f"the adapter holds NaN or infinity in {some(broken)}: it is not merged")
    for name, module in tokens.items():
        if not torch.isfinite(module.rows_KD).all():
            raise ValueError(f"the adapter holds NaN or infinity in {name}: it is not merged")
    in_place = named_modules(model)
    for layer in to_merge.values():
        _merge_layer(layer)
    for module in sorted(tokens.values(), key=lambda module: module.tied_to is not None):
        if not module.merged:
            module.merge_rows()
    if not unload:
        return
    made: dict[int, nn.Parameter] = {}
    for name, copied in copies.items():
        replace_module(in_place, name, _plain_copy(copied, made))
    for name, module in tokens.items():
        replace_module(in_place, name, module.base_layer)
    for name in reversed(layers):  # of wrappers around each other the inner ones first
        replace_module(in_place, name, layers[name].base_layer)
    for bias in biases.values():
        bias.requires_grad_(False)
    forget_biases(model)
    forget_active(model)
    _untie_if_diverged(uncompiled(model))


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """Undo ``merge_lora(model, unload=False)``: every base weight is again what it was, bit for bit.

    Raises:
        ValueError: if no adapter is merged.
    """
    merged = [layer for _, layer in lora_layers(model) if layer.original_weight is not None]
    tokens = [module for _, module in adapter_modules(model) if isinstance(module, TrainableTokens) and module.merged]
    if not merged and not tokens:
        raise ValueError("no adapter is merged: nothing to undo (after unload=True there is no way back)")
    for layer in merged:
        _restore(layer)
    for module in tokens:
        module.restore_rows()


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as without adapters and trained copies.

    Raises:
        ValueError: if the adapters are merged into the base weights, where they cannot be switched off.
    """
    modules = [module for _, module in adapter_modules(model)]
    if any(not isinstance(module, TrainableCopy) and module.merged for module in modules):
        raise ValueError("the adapters are merged: call unmerge_lora before disable_lora")
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    try:
        with original_biases(model):
            yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled


def _check_mergeable(layers: dict[str, LoRALayer]) -> None:
    quantized = [name for name, layer in layers.items() if layer.is_quantized]
    if quantized:
        raise ValueError(
            f"cannot merge into the quantized weights of {some(quantized)}: rounding them again would lose most of the "
            "adapter. Save the adapter and run `lit-lora merge`, or load the base model in 16 bits, load_adapter, and "
            "merge there"
        )
    for name, layer in layers.items():
        if layer.unmergeable is not None:
            raise ValueError(f"cannot merge into {name}: {layer.unmergeable}. Serve the adapter beside the base")
        owner, held = layer.held
        if held not in dict(owner.named_parameters(recurse=False)):
            raise ValueError(
                f"cannot merge into {name}: its weight is computed from others (weight norm, pruning, a "
                "parametrization), which would undo the merge. Make it a plain parameter first"
            )
        if not layer.base_is_plain and not _merges_right(layer):
            raise ValueError(
                f"cannot merge into {name}: {type(owner).__name__} does more with its weight than multiply (or a hook "
                "does), so that the merged layer would compute something else. Serve the adapter beside the base"
            )


def _merges_right(layer: LoRALayer) -> bool:
    """Whether the layer computes the same merged as unmerged, with another adapter of the size of its weight."""
    factors, training = layer.factors(), layer.training
    before, enabled, scaling = [factor.detach().clone() for factor in factors], layer.enabled, layer.scaling
    generator = torch.Generator().manual_seed(0)
    x = layer.sample_input(generator)
    layer.eval()
    try:
        for factor in factors:
            factor.copy_(torch.randn(factor.shape, generator=generator))
        layer.enabled, layer.scaling = True, 1.0
        layer.scaling = (layer.base_parameter.float().norm() / layer.delta_weight().float().norm()).item()
        expected = layer(x)
        _merge_layer(layer)
        got = layer(x)
    except (RuntimeError, TypeError, ValueError):  # it does not take what a plain layer takes
        return False
    finally:
        _restore(layer)
        for factor, values in zip(factors, before, strict=True):
            factor.copy_(values)
        layer.enabled, layer.scaling = enabled, scaling
        layer.train(training)
    return bool((got - expected).float().norm() <= 0.05 * expected.float().norm())


def _check_finite(layers: dict[str, LoRALayer], copies: dict[str, TrainableCopy]) -> None:
    for name, layer in layers.items():
        parts = {
            "the adapter holds": all(torch.isfinite(factor).all() for factor in layer.factors()),
            "the base holds": torch.isfinite(layer.base_parameter).all(),
            "the sum of base and adapter overflows to": torch.isfinite(layer.merged_weight()).all(),
        }
        if (bias := layer.merged_bias()) is not None:
            parts["the sum of both biases is"] = torch.isfinite(bias).all()
        for what, finite in parts.items():
            if not finite:
                raise ValueError(f"{what} NaN or infinity in {name}: it is not merged")
    for name, copied in copies.items():
        if not all(torch.isfinite(trained).all() for _, _, trained in _trained(copied)):
            raise ValueError(f"the adapter holds NaN or infinity in {name}: it is not merged")


def _merge_layer(layer: LoRALayer) -> None:
    """Give the base layer ``W + delta``; the wrapper keeps the old weight."""
    merged, bias = layer.merged_weight(), layer.merged_bias()
    layer.original_weight = (cast(nn.Parameter, layer.base_parameter),)
    layer.write_base(merged)
    if bias is not None:
        layer.original_bias = (layer.base_layer.bias,)
        layer.base_layer.bias = nn.Parameter(bias, requires_grad=False)


def _restore(layer: LoRALayer) -> None:
    """Take a merge back."""
    owner, held = layer.held
    for place, name, kept in ((owner, held, layer.original_weight), (layer.base_layer, "bias", layer.original_bias)):
        if kept is None:
            continue
        (original,) = kept
        device = getattr(place, name).device
        # The model may have moved since; the tuple did not move along.
        moved = nn.Parameter(original.to(device), requires_grad=original.requires_grad)
        setattr(place, name, original if original.device == device else moved)
    layer.original_weight = layer.original_bias = None


def _plain_copy(wrapper: TrainableCopy, made: dict[int, nn.Parameter]) -> nn.Module:
    """The trained module, frozen, in the dtypes of the original; ``made`` keeps what is tied so."""
    for module, name, trained in list(_trained(wrapper)):
        source = getattr(module, name)
        setattr(module, name, made.setdefault(id(source), nn.Parameter(trained, requires_grad=False)))
    return wrapper.copy


def _trained(wrapper: TrainableCopy) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter of the copy in the dtype of the original, with the module that holds it and its name there."""
    for ours, original in zip(wrapper.copy.modules(), wrapper.base_layer.modules(), strict=True):
        for name, parameter in original.named_parameters(recurse=False):
            yield ours, name, getattr(ours, name).to(parameter.dtype)


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
