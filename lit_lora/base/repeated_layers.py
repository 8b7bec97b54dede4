"""The decoder layers of a model, found by what they are: a list of equal modules."""

from __future__ import annotations

from torch import nn


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of layers of one class, in order; empty if there is none of two or more."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(layer) for layer in module}) == 1
    ]
    longest = max(lists, key=len, default=[])
    return longest if len(longest) > 1 else []
