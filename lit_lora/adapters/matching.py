"""Which modules a configuration names. PEFT's rules (``tuners_utils.check_target_module_exists``), but never silent.

A list entry is a full name or the end of one, a string is a regular expression for the full name. Entries that match
nothing are collected as problems, because PEFT ignores them and files that it wrote may hold some.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lit_lora.adapters import base_weight
from lit_lora.adapters.int8_rows import Int8Rows
from lit_lora.config import LoRAConfig

ALL_LINEAR = "all-linear"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Matched:
    """The modules that a configuration names."""

    adapted: list[str]
    """Layers to wrap."""

    saved: list[str]
    """Modules to train in full."""

    ranks: dict[str, int]
    """Layers whose rank a pattern sets."""

    alphas: dict[str, float]
    """Layers whose alpha a pattern sets."""

    coverage: dict[str, int]
    """Entry of ``target_modules`` or ``modules_to_save`` -> number of modules that it matched."""

    problems: list[str]
    """Entries that match nothing or have no effect, as sentences."""


def match_modules(model: nn.Module, config: LoRAConfig) -> Matched:
    """Resolve every name and pattern of the configuration. Excludes win, then ``modules_to_save``, then targets.

    Raises:
        ValueError: if a match cannot be served: a wrong type of layer, ambiguous patterns, an invalid expression.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    problems: list[str] = []
    targeted = _match_targets(model, modules, config, problems)
    saved = _match_saved(modules, config, problems)
    left_out = {*_match_excluded(modules, config, problems), *saved}
    inside_saved = tuple(f"{name}." for name in saved)
    candidates = {
        name: targeted[name]
        for name in modules
        if name in targeted and name not in left_out and not name.startswith(inside_saved)
    }
    chosen = _in_layers(candidates, config, problems)
    _check_adaptable(modules, chosen)
    coverage = _count_coverage(config, targeted, chosen, saved, problems)
    ranks = _resolve_pattern("rank_pattern", config.rank_pattern, chosen, problems)
    alphas = _resolve_pattern("alpha_pattern", config.alpha_pattern, chosen, problems)
    return Matched(list(chosen), saved, ranks, alphas, coverage, problems)


def matches(name: str, entry: str) -> bool:
    """Whether a list entry names this module: in full, or by the end of its path."""
    return name == entry or name.endswith(f".{entry}")


def layer_index(name: str, patterns: list[str] | str | None = None) -> int | None:
    """Index of the decoder layer that a module lies in: the first number in its path, not that of an expert."""
    expressions = [r".*?\.[^.]*\.(?P<index>\d+)\.", r"[^.]*\.(?P<index>\d+)\."]
    if patterns:
        expressions = [
            rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)
        ]
    for expression in expressions:
        match = re.match(expression, name)
        if match:
            return int(match["index"])
    return None


def _match_saved(modules: dict[str, nn.Module], config: LoRAConfig, problems: list[str]) -> list[str]:
    saved: list[str] = []
    for entry in config.modules_to_save or []:
        found = [name for name in modules if matches(name, entry)]
        if not found:
            problems.append(f"modules_to_save entry {entry!r} matches no module; modules end in {_endings(modules)}")
        for name in found:
            if any(
                isinstance(m, Int8Rows) or (base_weight.may_be_quantized(m) and base_weight.is_quantized(m))
                for m in modules[name].modules()
            ):
                raise ValueError(
                    f"modules_to_save entry {entry!r} is quantized and cannot be trained in full: adapt it"
                )
            if not any(True for _ in modules[name].parameters()):
                raise ValueError(f"modules_to_save entry {entry!r} matches {name}, which has no parameters")
        saved += [name for name in found if name not in saved]
    nested = [name for name in saved if name.startswith(tuple(f"{other}." for other in saved))]
    if nested:
        raise ValueError(f"modules_to_save matches {some(nested)} inside of other modules that it matches")
    return saved


def _match_targets(
    model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig, problems: list[str]
) -> dict[str, list[str]]:
    """Module -> the entries of ``target_modules`` that name it."""
    targets = config.target_modules
    linear = {name: module for name, module in modules.items() if base_weight.is_linear_like(module)}
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        head = _output_head(model)
        found = {name: [ALL_LINEAR] for name, module in linear.items() if module is not head}
        if not found:
            problems.append(f"target_modules {ALL_LINEAR!r}: the model has no linear layer but the output head")
        return found
    if isinstance(targets, str):
        expression = _compile("target_modules", targets)
        found = {name: [targets] for name in modules if expression.fullmatch(name)}
        if not found:
            example = f"; the whole path has to match, such as {next(iter(linear))!r}" if linear else ""
            problems.append(f"target_modules {targets!r} matches no module{example}")
        return found
    found = {}
    for entry in targets:
        names = [name for name in modules if matches(name, entry)]
        for name in names:
            found.setdefault(name, []).append(entry)
        if not names:
            problems.append(f"target_modules entry {entry!r} matches no layer; linear layers end in {_endings(linear)}")
    return found


def _match_excluded(modules: dict[str, nn.Module], config: LoRAConfig, problems: list[str]) -> set[str]:
    excludes = config.exclude_modules
    if not excludes:
        return set()
    if isinstance(excludes, str):
        expression = _compile("exclude_modules", excludes)
        excluded = {name for name in modules if expression.fullmatch(name)}
        if not excluded:
            problems.append(f"exclude_modules {excludes!r} matches no module (the whole path has to match)")
        return excluded
    excluded = set()
    for entry in excludes:
        found = {name for name in modules if matches(name, entry)}
        if not found:
            problems.append(f"exclude_modules entry {entry!r} matches no module; modules end in {_endings(modules)}")
        excluded |= found
    return excluded


def _in_layers(candidates: dict[str, list[str]], config: LoRAConfig, problems: list[str]) -> dict[str, list[str]]:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return candidates
    indices = [wanted] if isinstance(wanted, int) else wanted
    found = {name: layer_index(name, config.layers_pattern) for name in candidates}
    present = sorted({index for index in found.values() if index is not None})
    missing = sorted(set(indices) - set(present))
    if missing:
        counted = "" if config.layers_pattern is None else f" of {config.layers_pattern!r}"
        have = ranges(present) if present else "none"
        problems.append(f"layers_to_transform {missing} match no targeted layer; indices{counted} present: {have}")
    return {name: entries for name, entries in candidates.items() if found[name] in indices}


def _check_adaptable(modules: dict[str, nn.Module], names: Iterable[str]) -> None:
    refused = {
        name: type(modules[name]).__name__
        for name in names
        if not base_weight.is_linear_like(modules[name]) and not isinstance(modules[name], nn.Embedding)
    }
    if refused:
        name, kind = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise ValueError(
            f"target_modules matches {name}{more} of type {kind}, which cannot be adapted; nn.Linear, nn.Embedding, "
            "Conv1D of transformers, and Linear4bit and Linear8bitLt of bitsandbytes can"
        )


def _count_coverage(
    config: LoRAConfig,
    targeted: dict[str, list[str]],
    chosen: dict[str, list[str]],
    saved: list[str],
    problems: list[str],
) -> dict[str, int]:
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    coverage = {entry: sum(entry in entries for entries in chosen.values()) for entry in targets}
    for entry, count in coverage.items():
        if not count and any(entry in entries for entries in targeted.values()) and not problems:
            problems.append(
                f"target_modules entry {entry!r} has no effect: all it matches is left out by exclude_modules, "
                "modules_to_save or layers_to_transform"
            )
    for entry in config.modules_to_save or []:
        coverage[f"{entry} (in full)"] = sum(matches(name, entry) for name in saved)
    return coverage


def _resolve_pattern(
    field_name: str, patterns: dict[str, _T], names: Iterable[str], problems: list[str]
) -> dict[str, _T]:
    """Name -> value of the first pattern that matches it, as PEFT's ``get_pattern_key``."""
    expressions = {pattern: _compile(field_name, rf"(.*\.)?({pattern})$") for pattern in patterns}
    resolved: dict[str, _T] = {}
    used: set[str] = set()
    for name in names:
        hits = [pattern for pattern, expression in expressions.items() if expression.match(name)]
        used |= set(hits)
        if len({patterns[hit] for hit in hits}) > 1:
            raise ValueError(
                f"{field_name}: {hits} all match {name} but differ in value. adapter_config.json is sorted by key, so "
                "which one counts would change on reload: make the patterns exclusive"
            )
        if hits:
            resolved[name] = patterns[hits[0]]
    for pattern in patterns:
        if pattern not in used:
            problems.append(f"{field_name} entry {pattern!r} matches no adapted layer; they end in {_endings(names)}")
    return resolved


def _output_head(model: nn.Module) -> nn.Module | None:
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    return model.get_output_embeddings()


def _compile(field_name: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{field_name}: {expression!r} is no regular expression: {error}") from error


def _endings(names: Iterable[str]) -> str:
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
