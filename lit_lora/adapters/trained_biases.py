"""Biases of the base that are trained along: PEFT's ``bias``, "all" or "lora_only" of them.

"All" are those that are called so, as in PEFT 0.21; 0.18 trained whatever has "bias" in its name, such as the biases of
fused experts, and its files are read with these. They are parameters of the base, trained where they are. What they
were is noted on the model, so that the adapter can be switched off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_lora.adapters.module_names import is_inside, plain_name, uncompiled

_KEY = "lit_lora_trained_biases"


def biases_to_train(
    modules: Mapping[str, nn.Module],
    which: Literal["none", "all", "lora_only"],
    *,
    adapted: Collection[str],
    wrapped: Mapping[str, int],
    saved: Collection[str],
    from_file: bool = False,
) -> dict[str, nn.Parameter]:
    """Name that each will have in the model -> the bias.

    Args:
        modules: of the model, by name.
        which: of them.
        adapted: layers that get an adapter.
        wrapped: module -> how many wrappers will stand around it.
        saved: modules that are trained in full.
        from_file: whether PEFT may have written so, which takes a setting without effect.

    Raises:
        ValueError: if there is none.
    """
    if which == "none":
        return {}
    found = {}
    for name, module in modules.items():
        bias = dict(module.named_parameters(recurse=False)).get("bias")
        if bias is None or name in saved or is_inside(name, saved) or (which == "lora_only" and name not in adapted):
            continue
        found[".".join([name, *["base_layer"] * wrapped.get(name, 0), "bias"]).lstrip(".")] = bias
    if not found and not from_file:
        layers = "adapted layer" if which == "lora_only" else "layer"
        raise ValueError(f"bias {which!r} has no effect: no {layers} of the model has a bias")
    return found


def further_biases(model: nn.Module, planned: Collection[str], stored: Collection[str]) -> dict[str, nn.Parameter]:
    """What a file holds beside what is planned, and PEFT 0.18 took for biases: name in the adapted model -> parameter.

    Args:
        model: without adapters.
        planned: tensors of the adapter, by their names in the model.
        stored: those that the file has.
    """
    own = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    names = {name: name.replace(".base_layer.", ".") for name in stored if "bias" in name and name not in planned}
    # That of a module which is trained as a whole is in the file a second time: it is the copy's.
    return {name: own[held] for name, held in names.items() if held in own and held not in planned}


def note_biases(model: nn.Module, biases: Mapping[str, nn.Parameter]) -> None:
    """Note what biases are before they are trained, and let them be trained."""
    for bias in biases.values():
        bias.requires_grad_(True)
    if biases:
        vars(model)[_KEY] = {name: bias.detach().clone() for name, bias in biases.items()}


def forget_biases(model: Any) -> None:
    """They are the base's from here on."""
    vars(uncompiled(model)).pop(_KEY, None)


def trained_biases(model: Any) -> dict[str, nn.Parameter]:
    """Name -> bias that belongs to the adapter."""
    noted = vars(uncompiled(model)).get(_KEY, {})
    if not noted:
        return {}
    own = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if (kept := getattr(module, "original_bias", None)) is not None:  # another stands there while it is merged
            own[f"{plain_name(name)}.base_layer.bias"] = kept[0]
    return {name: own[name] for name in noted}


@dataclass
class TakenBiases:
    """Biases that an adapter has trained, while another adapter is in the model."""

    held: list[nn.Parameter] = field(default_factory=list)
    original: list[Tensor] = field(default_factory=list)
    trained: list[Tensor] = field(default_factory=list)
    trainable: list[bool] = field(default_factory=list)


def take_biases(model: Any, own: TakenBiases | None = None) -> TakenBiases:
    """Put the original biases back, and return what they were trained to.

    Args:
        model: with the adapter in it.
        own: those of one of several adapters; None for all.
    """
    noted: dict[str, Tensor] = vars(uncompiled(model)).get(_KEY, {})
    found = trained_biases(model)
    names = [name for name in found if own is None or any(found[name] is bias for bias in own.held)]
    held = [found[name] for name in names]
    taken = TakenBiases(held, [noted[name] for name in names], [bias.detach().clone() for bias in held])
    taken.trainable = [bias.requires_grad for bias in held]
    _set(dict(zip(names, held, strict=True)), noted)
    for name, bias in zip(names, held, strict=True):
        bias.requires_grad_(False)
        del noted[name]
    return taken


def put_biases(model: Any, taken: TakenBiases) -> None:
    """The inverse of :func:`take_biases`."""
    noted: dict[str, Tensor] = vars(uncompiled(model)).setdefault(_KEY, {})
    names = {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}
    for bias, original, trained, trainable in zip(
        taken.held, taken.original, taken.trained, taken.trainable, strict=True
    ):
        noted[names[id(bias)]] = original
        with torch.no_grad():
            bias.copy_(trained)
        bias.requires_grad_(trainable)


@contextmanager
def original_biases(model: Any) -> Iterator[None]:
    """Within the context, biases are what they were before they were trained."""
    biases = trained_biases(model)
    noted: dict[str, Tensor] = vars(uncompiled(model)).get(_KEY, {})
    trained = {name: bias.detach().clone() for name, bias in biases.items()}
    _set(biases, noted)
    try:
        yield
    finally:
        _set(biases, trained)


@torch.no_grad()
def _set(biases: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, bias in biases.items():
        bias.copy_(values[name])
