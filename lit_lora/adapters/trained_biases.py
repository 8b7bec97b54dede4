"""Biases of the base that are trained along: PEFT's ``bias``, "all" or "lora_only" of them.

They are parameters of the base, trained where they are. What they were is noted on the model, so that the adapter can
be switched off.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_lora.adapters.module_names import is_inside, plain_name

_KEY = "lit_lora_trained_biases"


def biases_to_train(
    modules: Mapping[str, nn.Module],
    which: Literal["none", "all", "lora_only"],
    *,
    adapted: Collection[str],
    wrapped: Mapping[str, int],
    saved: Collection[str],
) -> dict[str, nn.Parameter]:
    """Name that each will have in the model -> the bias.

    Args:
        modules: of the model, by name.
        which: of them.
        adapted: layers that get an adapter.
        wrapped: module -> how many wrappers will stand around it.
        saved: modules that are trained in full.

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
    if not found:
        layers = "adapted layer" if which == "lora_only" else "layer"
        raise ValueError(f"bias {which!r} has no effect: no {layers} of the model has a bias")
    return found


def note_biases(model: nn.Module, biases: Mapping[str, nn.Parameter]) -> None:
    """Note what biases are before they are trained, and let them be trained."""
    for bias in biases.values():
        bias.requires_grad_(True)
    if biases:
        vars(model)[_KEY] = {name: bias.detach().clone() for name, bias in biases.items()}


def forget_biases(model: Any) -> None:
    """They are the base's from here on."""
    vars(getattr(model, "_orig_mod", model)).pop(_KEY, None)


def trained_biases(model: Any) -> dict[str, nn.Parameter]:
    """Name -> bias that belongs to the adapter."""
    noted = vars(getattr(model, "_orig_mod", model)).get(_KEY, {})
    if not noted:
        return {}
    own = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    return {name: own[name] for name in noted}


@contextmanager
def original_biases(model: Any) -> Iterator[None]:
    """Within the context, biases are what they were before they were trained."""
    biases = trained_biases(model)
    noted: dict[str, Tensor] = vars(getattr(model, "_orig_mod", model)).get(_KEY, {})
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
