"""Which modules a configuration names. PEFT's rules (``tuners_utils.check_target_module_exists``), but never silent.

A list entry is a full name or the end of one, a string is a regular expression for the full name. Entries that match
nothing are collected as problems, because PEFT ignores them and files that it wrote may hold some.

Only ``modules_to_save`` is understood in two ways. PEFT takes every module whose name ends in the letters of an entry,
so that "norm" is ``input_layernorm`` too; files are read so. What a user writes are names, like all others, and the
modules that were meant go into the file by their full names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lit_lora.adapters.expressions import find, shown
from lit_lora.adapters.layer_kinds import KINDS, kind_of
from lit_lora.adapters.module_names import by_end, endings, is_inside, named_modules, ranges, some, unmatched
from lit_lora.adapters.target_parameters import experts_of, match_parameters
from lit_lora.adapters.task_heads import as_pretrained, task_heads
from lit_lora.adapters.tied import add_tied
from lit_lora.base import base_weight
from lit_lora.base.int8_rows import Int8Rows
from lit_lora.config import LoRAConfig

ALL_LINEAR = "all-linear"
_IN_LORA_LAYERS = ("base_layer", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "default")
"""What PEFT's own layers hold: their names can end like those of other modules."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Matched:
    """The modules that a configuration names."""

    adapted: list[str]
    """Layers to wrap."""

    saved: list[str]
    """Modules to train in full."""

    parameters: list[str]
    """Parameters to adapt that no layer holds."""

    ranks: dict[str, int]
    """Layers and parameters whose rank a pattern sets; experts of a parameter too, by its name and their number."""

    alphas: dict[str, float]
    """Layers and parameters whose alpha a pattern sets."""

    coverage: dict[str, int]
    """Entry of ``target_modules`` or ``modules_to_save`` -> number of modules that it matched."""

    problems: list[str]
    """Entries that match nothing or have no effect, as sentences."""


def match_modules(model: nn.Module, config: LoRAConfig, *, from_file: bool = False) -> Matched:
    """Resolve every name and pattern of the configuration. Excludes win, then ``modules_to_save``, then targets.

    Args:
        model: without adapters.
        config: names and patterns.
        from_file: whether PEFT may have written it: then ``modules_to_save`` is read as PEFT does. Otherwise the head
            of a classifier is trained in full too.

    Raises:
        ValueError: if a match cannot be served: a wrong type of layer, an invalid expression, a name that PEFT would
            take for others too.
    """
    modules = {name: module for name, module in named_modules(model).items() if name}
    problems: list[str] = []
    targeted = _match_targets(model, modules, config, problems)
    excluded = _match_excluded(modules, config, problems)
    entries = _match_saved(modules, config.modules_to_save or [], from_file, problems)
    if not from_file:
        entries |= {name: [name] for name in task_heads(model) if name not in excluded}
    if config.ensure_weight_tying:
        add_tied(model, config, targeted, entries, from_file=from_file)
    _check_trainable(modules, entries)
    saved = dict.fromkeys(name for names in entries.values() for name in names)
    left_out = {*excluded, *saved}
    candidates = {
        name: targeted[name]
        for name in modules
        if name in targeted and name not in left_out and not is_inside(name, saved)
    }
    chosen = _in_layers(candidates, config, problems)
    _check_adaptable(modules, chosen)
    _check_unmistakable(modules, chosen, saved)
    coverage = _count_coverage(config, targeted, chosen, entries, problems)
    parameters = match_parameters(modules, config.target_parameters or [], chosen, saved, problems)
    for found in parameters.values():
        for entry in found:
            coverage[entry] = coverage.get(entry, 0) + 1
    patterned = [*chosen, *parameters]
    ranked = [*patterned, *experts_of(modules, parameters)] if config.rank_pattern else patterned
    ranks = resolve_pattern("rank_pattern", config.rank_pattern, ranked, problems)
    alphas = resolve_pattern("alpha_pattern", config.alpha_pattern, patterned, problems)
    return Matched(list(chosen), list(saved), list(parameters), ranks, alphas, coverage, problems)


def resolve_pattern(
    field_name: str, patterns: dict[str, _T], names: Collection[str], problems: list[str] | None = None
) -> dict[str, _T]:
    """Name -> value of the first pattern that matches it, as PEFT's ``get_pattern_key``.

    Args:
        field_name: for errors.
        patterns: in their order.
        names: of adapted layers.
        problems: gets those that match nothing.
    """
    if not patterns:
        return {}
    found = find(field_name, {pattern: rf"(.*\.)?({pattern})$" for pattern in patterns}, names)
    if problems is not None:
        idle = [pattern for pattern in patterns if not found[pattern]]
        problems += unmatched(field_name, idle, "adapted layer", f"they end in {endings(names)}")
    resolved: dict[str, _T] = {}
    for pattern, value in patterns.items():
        for name in found[pattern]:
            resolved.setdefault(name, value)
    return resolved


def layer_indices(names: Iterable[str], patterns: list[str] | str | None = None) -> dict[str, int]:
    """Index of the decoder layer that a module lies in, as PEFT finds it; modules without one are left out.

    It is the first number in the path, not that of an expert. A list of layers at the top of the model has to be named.
    """
    names = list(names)
    if not patterns:
        first = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
        return {name: int(match["index"]) for name in names if (match := first.match(name))}
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = find("layers_pattern", {p: rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in patterns}, names)
    indices: dict[str, int] = {}
    for pattern in patterns:
        for name, index in found[pattern].items():
            indices.setdefault(name, int(index))
    return indices


def saved_as_peft(names: Iterable[str], entries: Iterable[str]) -> dict[str, list[str]]:
    """Entry of ``modules_to_save`` -> names that end in its letters: PEFT's rule (``other._set_trainable``)."""
    found: dict[str, list[str]] = {entry: [] for entry in entries}
    for name in names:
        for start in range(len(name)):
            if name[start:] in found:
                found[name[start:]].append(name)
    return found


def _match_saved(
    modules: dict[str, nn.Module], wanted: list[str], from_file: bool, problems: list[str]
) -> dict[str, list[str]]:
    if from_file:
        held = [name for name, module in modules.items() if any(True for _ in module.parameters())]
        found = saved_as_peft(held, wanted)
    else:
        ends = by_end(modules)
        found = {entry: ends.get(entry, []) for entry in wanted}
    idle = [entry for entry, names in found.items() if not names]
    problems += unmatched("modules_to_save", idle, "module", f"modules end in {endings(modules)}")
    return found


def _check_trainable(modules: dict[str, nn.Module], entries: dict[str, list[str]]) -> None:
    for entry, names in entries.items():
        for name in names:
            module = modules[name]
            if any(isinstance(m, Int8Rows) or _is_quantized(m) for m in module.modules()):
                raise ValueError(
                    f"modules_to_save entry {entry!r} is quantized and cannot be trained in full: adapt it, or add it "
                    "to quantization.skip_modules (for the head of a classifier, exclude_modules leaves it as it is)"
                )
            if not any(True for _ in module.parameters()):
                raise ValueError(f"modules_to_save entry {entry!r} matches {name}, which has no parameters")
            if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)):
                raise ValueError(
                    f"modules_to_save entry {entry!r} matches {name}, a {type(module).__name__}, which is never "
                    "called: name what is in it"
                )
    saved = {name for names in entries.values() for name in names}
    nested = [name for name in sorted(saved) if is_inside(name, saved)]
    if nested:
        raise ValueError(f"modules_to_save matches {some(nested)} inside of other modules that it matches")


def _check_unmistakable(modules: dict[str, nn.Module], adapted: Iterable[str], saved: Collection[str]) -> None:
    """What is trained in full has to be found again by PEFT, which knows no rule to tell ``head`` from ``lm_head``."""
    inside = [f"{name}.{part}" for name in adapted for part in _IN_LORA_LAYERS]
    for name, found in saved_as_peft([*modules, *inside], saved).items():
        others = [other for other in found if other not in saved]
        if others:
            raise ValueError(
                f"modules_to_save: {name} cannot be told from {some(others)} in an adapter's files, since PEFT goes by "
                "how a name ends: train these too, or adapt it instead"
            )


def _match_targets(
    model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig, problems: list[str]
) -> dict[str, list[str]]:
    """Module -> the entries of ``target_modules`` that name it."""
    targets = config.target_modules
    linear = {name: module for name, module in modules.items() if base_weight.is_linear_like(module)}
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        pretrained = as_pretrained(model)
        head = pretrained.get_output_embeddings() if pretrained is not None else None
        found = {name: [ALL_LINEAR] for name, module in linear.items() if module is not head}
        if not found:
            problems.append(f"target_modules {ALL_LINEAR!r}: the model has no linear layer but the output head")
        return found
    if isinstance(targets, str):
        found = {name: [targets] for name in find("target_modules", {targets: targets}, modules, whole=True)[targets]}
        if not found:
            example = f"; the whole path has to match, such as {next(iter(linear))!r}" if linear else ""
            problems.append(f"target_modules {targets!r} matches no module{example}")
        return found
    ends = by_end(modules)
    found = {}
    for entry in targets:
        for name in ends.get(entry, []):
            found.setdefault(name, []).append(entry)
    idle = [entry for entry in targets if entry not in ends]
    problems += unmatched("target_modules", idle, "layer", f"linear layers end in {endings(linear)}")
    return found


def _match_excluded(modules: dict[str, nn.Module], config: LoRAConfig, problems: list[str]) -> set[str]:
    excludes = config.exclude_modules
    if not excludes:
        return set()
    if isinstance(excludes, str):
        excluded = set(find("exclude_modules", {excludes: excludes}, modules, whole=True)[excludes])
        if not excluded:
            problems.append(f"exclude_modules {shown(excludes)} matches no module (the whole path has to match)")
        return excluded
    ends = by_end(modules)
    idle = [entry for entry in excludes if entry not in ends]
    problems += unmatched("exclude_modules", idle, "module", f"modules end in {endings(modules)}")
    return {name for entry in excludes for name in ends.get(entry, [])}


def _in_layers(candidates: dict[str, list[str]], config: LoRAConfig, problems: list[str]) -> dict[str, list[str]]:
    """Without the layers that ``layers_to_transform`` leaves out; it does not apply to full names, as in PEFT."""
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return candidates
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    found = layer_indices(candidates, config.layers_pattern)
    missing = sorted(indices - set(found.values()))
    if missing:
        counted = f" of {config.layers_pattern!r}" if config.layers_pattern else ""
        have = ranges(found.values()) if found else "none"
        hint = "" if found else _name_the_list(candidates)
        problems.append(
            f"layers_to_transform [{ranges(missing)}] match no targeted layer; indices{counted} present: {have}{hint}"
        )
    full = set() if isinstance(config.target_modules, str) else set(config.target_modules)
    return {name: entries for name, entries in candidates.items() if name in full or found.get(name) in indices}


def _name_the_list(names: Iterable[str]) -> str:
    lists = sorted({match[1] for name in names if (match := re.match(r"([^.]*[^.\d][^.]*)\.\d+\.", name))})
    return f" (where the list of layers is at the top of the model, set layers_pattern: {some(lists)})" if lists else ""


def _check_adaptable(modules: dict[str, nn.Module], names: Iterable[str]) -> None:
    refused = {name: type(modules[name]).__name__ for name in names if kind_of(modules[name]) is None}
    if refused:
        name, kind = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(
            f"target_modules matches {name}{more} of type {kind}, which cannot be adapted; "
            f"{', '.join(known.names for known in KINDS)} can"
        )


def _count_coverage(
    config: LoRAConfig,
    targeted: dict[str, list[str]],
    chosen: dict[str, list[str]],
    saved: dict[str, list[str]],
    problems: list[str],
) -> dict[str, int]:
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    coverage = dict.fromkeys(targets, 0)
    for entries in chosen.values():
        for entry in entries:
            coverage[entry] += 1
    matching = {entry for entries in targeted.values() for entry in entries}
    for entry, count in coverage.items():
        if not count and entry in matching and not problems:
            problems.append(
                f"target_modules entry {entry!r} has no effect: all it matches is left out by exclude_modules, "
                "modules_to_save (the head of a classifier is trained in full too) or layers_to_transform"
            )
    return coverage | {f"{entry} (in full)": len(names) for entry, names in saved.items()}


def _is_quantized(module: nn.Module) -> bool:
    return base_weight.may_be_quantized(module) and base_weight.is_quantized(module)
