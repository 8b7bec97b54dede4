"""Modules of a model by the names that they have in files: without what wrappers put into the path.

``torch.compile(model)`` and torch's checkpoint wrapper keep the module that they wrap under a name of their own, which
would end up in every key of an adapter and in every name that is matched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from lit_lora.adapters.expressions import shown

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def uncompiled(model: Any) -> Any:
    """The model itself, out of ``torch.compile`` if need be."""
    return getattr(model, "_orig_mod", model)


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


def by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """Full name, or end of one -> the names that it stands for in a list."""
    ends: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            ends.setdefault(".".join(parts[start:]), []).append(name)
    return ends


def is_inside(name: str, others: Collection[str]) -> bool:
    """Whether a module lies in one of others."""
    return any(name[:end] in others for end, letter in enumerate(name) if letter == ".")


def unmatched(field_name: str, entries: list[str], what: str, known: str) -> list[str]:
    """Sentences about entries of a field that match nothing, the first with what there is."""
    named = [f"{field_name} entry {shown(entry)} matches no {what}" for entry in entries[:5]]
    if len(entries) > 5:
        named.append(f"nor do {len(entries) - 5} more")
    return [f"{named[0]}; {known}", *named[1:]] if named else []


def endings(names: Iterable[str]) -> str:
    """How names end, without numbers."""
    return some(sorted({name.rpartition(".")[2] for name in names} - {str(i) for i in range(1000)}), limit=20)


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few of many names."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def ranges(numbers: Iterable[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
