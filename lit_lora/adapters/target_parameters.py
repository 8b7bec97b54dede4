"""Which parameters ``target_parameters`` names: full names or ends of them, as PEFT has it (``_inject_parameters``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from lit_lora.adapters.module_names import by_end, endings, is_inside, unmatched


def match_parameters(
    modules: dict[str, nn.Module],
    wanted: list[str],
    adapted: Collection[str],
    saved: Collection[str],
    problems: list[str],
) -> dict[str, list[str]]:
    """Parameter -> the entries of ``target_parameters`` that name it, in the model's order.

    Args:
        modules: by name.
        wanted: full names of parameters, or ends of them.
        adapted: layers that get an adapter.
        saved: modules that are trained in full.
        problems: gets entries that match nothing.

    Raises:
        ValueError: if one cannot be adapted.
    """
    if not wanted:
        return {}
    ends = by_end(f"{name}.{held}" for name, module in modules.items() for held in _own(module))
    found: dict[str, list[str]] = {}
    for entry in wanted:
        for name in ends.get(entry, []):
            found.setdefault(name, []).append(entry)
    fused = [f"{n}.{held}" for n, m in modules.items() for held, p in _own(m).items() if p.ndim == 3]
    known = f"fused 3-D parameters end in {endings(fused)}" if fused else "the model has no fused 3-D parameters"
    problems += unmatched("target_parameters", [entry for entry in wanted if entry not in ends], "parameter", known)
    for name in found:
        owner, _, held = name.rpartition(".")
        parameter = _own(modules[owner])[held]
        if parameter.ndim not in (2, 3) or not parameter.is_floating_point():
            raise ValueError(
                f"target_parameters matches {name}, which is {tuple(parameter.shape)} of {parameter.dtype}: "
                "parameters of 2 or 3 dimensions in full "
                "precision can be adapted"
            )
        if owner in adapted or owner in saved or is_inside(owner, saved):
            raise ValueError(
                f"target_parameters matches {name}, whose module is adapted or trained in full already: name it in one "
                "of target_parameters, target_modules and modules_to_save"
            )
    order = {f"{name}.{held}": None for name, module in modules.items() for held in _own(module)}
    return {name: found[name] for name in order if name in found}


def experts_of(modules: dict[str, nn.Module], parameters: Iterable[str]) -> list[str]:
    """Names that experts of adapted parameters have in ``rank_pattern``."""
    names = []
    for name in parameters:
        owner, _, held = name.rpartition(".")
        parameter = _own(modules[owner])[held]
        names += [f"{name}.{number}" for number in range(len(parameter))] if parameter.ndim == 3 else []
    return names


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(recurse=False, remove_duplicate=False))
