"""Experts of a mixture that are fused into 3-D parameters, which adapters on layers miss."""

from __future__ import annotations

from typing import Any

from torch import nn


def expert_coverage(model: nn.Module) -> str | None:
    """How much of the frozen fused weights has adapters, in words; None for a model without such weights.

    Wrappers of lit_lora and of PEFT say which parameter of the module inside them they adapt.
    """
    fused = {
        id(p): p.numel()
        for p in model.parameters()
        if p.ndim == 3 and min(p.shape) > 1 and p.is_floating_point() and not p.requires_grad
    }
    if not fused:
        return None
    adapted = {id(parameter) for module in model.modules() if (parameter := _adapted_parameter(module)) is not None}
    num_adapted = len(fused.keys() & adapted)
    frozen = sum(size for key, size in fused.items() if key not in adapted)
    share = 100 * frozen / sum(p.numel() for p in model.parameters())
    if not frozen:
        return f"all {len(fused)} fused 3-D weights have adapters"
    return (
        f"{len(fused) - num_adapted} of {len(fused)} fused 3-D weights, {share:.0f}% of all parameters, have no adapter"
    )


def _adapted_parameter(module: Any) -> nn.Parameter | None:
    name = vars(module).get("parameter_name")
    if name is None:
        return None
    while "base_layer" in (children := dict(module.named_children())):
        module = children["base_layer"]
    return dict(module.named_parameters(recurse=False)).get(name)
