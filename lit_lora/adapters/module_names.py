"""Modules of a model by the names that they have in files: without what wrappers put into the path.

``torch.compile(model)`` and torch's checkpoint wrapper keep the module that they wrap under a name of their own, which
would end up in every key of an adapter and in every name that is matched.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """The name of a module or parameter without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, in the model's order, the model itself as "". Wrappers are left out, what they wrap is there."""
    modules: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        modules[plain_name(name)] = module  # what is wrapped comes after its wrapper
    return modules


def shared_modules(model: nn.Module) -> set[int]:
    """``id`` of every module that a model holds in more than one place: replacing one would leave the others."""
    places: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():  # children() tells each once
            places[id(child)] = places.get(id(child), 0) + 1
    return {module for module, count in places.items() if count > 1}


def replace_module(modules: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    """Put another module in the place of one; a wrapper around the old one goes.

    Args:
        modules: of the model, as :func:`named_modules` gives them.
        name: which one.
        module: what takes its place.
    """
    parent, _, last = name.rpartition(".")
    setattr(modules[parent], last, module)
