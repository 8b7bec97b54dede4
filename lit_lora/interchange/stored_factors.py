"""The low-rank layers of an adapter in a folder as matrices, without its base: read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_lora.adapters.matching import resolve_pattern, some
from lit_lora.base.trained_on import KEY, TrainedOn, read_record
from lit_lora.config import LoRAConfig
from lit_lora.interchange.adapter_writing import write_adapter
from lit_lora.interchange.factors import ENDS, Factors, Layout
from lit_lora.interchange.peft_config import to_peft_config
from lit_lora.interchange.peft_folder import CONFIG_NAME, PREFIX, find_weights, read_config
from lit_lora.interchange.stored_adapter import StoredAdapter, read_adapter, stored_values

_OUTPUT = ".base_layer.out_proj"
"""Of an attention of torch, which a configuration calls by the attention's name."""


class AdapterFactors(NamedTuple):
    """An adapter in a folder."""

    stored: StoredAdapter
    layers: dict[str, Factors]
    parameters: list[str]
    """Those of ``layers`` that are on parameters, such as fused experts."""
    others: dict[str, Tensor]
    """What is no product of matrices: lengths of DoRA, rows of embeddings, copies, biases."""
    record: TrainedOn
    content: dict[str, object]
    """Of ``adapter_config.json``."""


def read_factors(folder_or_hub_id: str | Path) -> AdapterFactors:
    """Read an adapter as matrices.

    Raises:
        ValueError: if it cannot be read, or it is not known where its matrices end.
    """
    stored = read_adapter(folder_or_hub_id)
    assert stored.folder is not None
    config = stored.config
    state = stored_values(stored)
    pairs = {name.removesuffix(f".{end}"): end for name in state for end in ENDS if name.endswith(f".{end}")}
    fused = [name for name in pairs if _is_parameter(name, config)]
    _check_ranks_of_parameters(fused, stored)
    targets = {name: target_of(name) for name in pairs if name not in fused}
    ranks = resolve_pattern("rank_pattern", config.rank_pattern, targets.values())
    alphas = resolve_pattern("alpha_pattern", config.alpha_pattern, targets.values())
    layers: dict[str, Factors] = {}
    for layer, end in pairs.items():
        lora_A, lora_B = state.pop(f"{layer}.{end}"), state.pop(f"{layer}.{ENDS[end]}", None)
        if lora_B is None:
            raise ValueError(f"{stored.source} holds A of {layer} and no B: take an undamaged copy")
        target = targets.get(layer, "")
        r, alpha = ranks.get(target, config.r), alphas.get(target, config.lora_alpha)
        layout = _layout(lora_A, lora_B, end, r if layer in fused else None)
        if layout is None:
            raise ValueError(
                f"{stored.source} holds A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)} of {layer}, which do not "
                f"belong together at rank {r}: take an undamaged copy"
            )
        lora_A, lora_B = layout.apart(lora_A, lora_B)
        found = Factors(lora_A, lora_B, 1.0, layout)
        layers[layer] = found._replace(scaling=config.scaling(found.r, alpha))
    if not layers:
        raise ValueError(f"{stored.source} has no low-rank layers")
    record = read_record(find_weights(stored.folder))
    return AdapterFactors(stored, layers, fused, state, record, read_config(stored.folder / CONFIG_NAME))


def target_of(name: str) -> str:
    """What a configuration calls a layer."""
    return name.removesuffix(_OUTPUT)


def _is_parameter(name: str, config: LoRAConfig) -> bool:
    """Whether this is on a parameter of a module, and not around a layer that ``target_modules`` names."""
    if not config.target_parameters:
        return False
    targets = config.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, target_of(name)) is None
    return not any(target_of(name) == entry or target_of(name).endswith(f".{entry}") for entry in targets)


def _check_ranks_of_parameters(fused: Sequence[str], stored: StoredAdapter) -> None:
    """A file does not say which parameter of a module its tensors are on, so they must have the same rank and scale."""
    owners = [re.sub(r"(\.base_layer)+$", "", name) for name in fused]
    held = {entry.rpartition(".")[2] for entry in stored.config.target_parameters or []}
    names = [f"{owner}.{parameter}" for owner in owners for parameter in held]
    for field in ("rank_pattern", "alpha_pattern"):
        if found := resolve_pattern(field, getattr(stored.config, field), names):
            raise ValueError(
                f"{stored.source} has {field} for the parameters {some(found)}: without the base it is not known "
                "which tensors are theirs. Only parameters of one rank and alpha can be worked on so"
            )


def _layout(lora_A: Tensor, lora_B: Tensor, end: str, r: int | None) -> Layout | None:
    """How matrices lie in these; with ``r``, they are on a parameter, of one expert or several. None if they do not."""
    if lora_A.ndim < 2 or lora_B.ndim != lora_A.ndim or not lora_B.shape[1]:
        return None
    if r is not None:
        experts, rest = divmod(len(lora_A), r)
        return None if rest or lora_B.shape[1] != len(lora_A) else Layout(end, parts=experts, of="experts")
    groups, rest = divmod(len(lora_A), lora_B.shape[1])
    if rest or len(lora_B) % groups or (groups > 1 and lora_A.ndim == 2):
        return None
    return Layout(end, tuple(lora_A.shape[2:]), groups)


def write_factors(
    folder: str | Path,
    layers: Mapping[str, Factors],
    config: LoRAConfig,
    like: Sequence[AdapterFactors],
    others: Mapping[str, Tensor],
) -> Path:
    """Write layers as an adapter of PEFT's format.

    Args:
        folder: to make.
        layers: by name; their scale is that of ``config``.
        config: of the adapter.
        like: what it was made of: it belongs to their base, and its record says what theirs have in common.
        others: further tensors.

    Raises:
        ValueError: if the folder is one of those that it was made of, or a tensor holds NaN or infinity.
    """
    target = Path(folder)
    if any(target.resolve() == Path(each.stored.source).resolve() for each in like):
        raise ValueError(f"output {folder} is one of the adapters: give another folder")
    state = {key: tensor for name, each in layers.items() for key, tensor in each.named(name).items()} | {**others}
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"the result holds NaN or infinity in {some(broken)}: it is not written")
    first = like[0].content
    base, revision, task = (first.get(key) for key in ("base_model_name_or_path", "revision", "task_type"))
    content = to_peft_config(
        config,
        str(base) if base else None,
        revision=str(revision) if revision else None,
        task_type=str(task) if task else None,
        fan_in_fan_out=bool(first.get("fan_in_fan_out")),
    )
    record = _common([each.record for each in like])
    metadata = {KEY: record.to_json()} if record != TrainedOn() else {}
    return write_adapter(target, {f"{PREFIX}{name}": tensor for name, tensor in state.items()}, content, metadata)


def names_to_write(adapters: Sequence[AdapterFactors], layers: Sequence[str]) -> list[str]:
    """``target_modules`` for layers: as the adapters have them where that means the same for all of them."""
    lists = [each.stored.config.target_modules for each in adapters]
    plain = all(
        isinstance(each.stored.config.target_modules, list)
        and each.stored.config.layers_to_transform is None
        and not each.stored.config.exclude_modules
        for each in adapters
    )
    if plain:
        return sorted({entry for entries in lists for entry in entries})
    parameters = {name for each in adapters for name in each.parameters}
    return sorted({target_of(name) for name in layers if name not in parameters})


def same_base(adapters: Sequence[AdapterFactors]) -> None:
    """Refuse adapters of different bases.

    Raises:
        ValueError: naming them.
    """
    first = adapters[0]
    for other in adapters[1:]:
        hashes = (first.record.base_hash, other.record.base_hash)
        names = (first.content.get("base_model_name_or_path"), other.content.get("base_model_name_or_path"))
        known = None not in hashes
        if (known and hashes[0] != hashes[1]) or (not known and None not in names and names[0] != names[1]):
            raise ValueError(
                f"{first.stored.source} was trained on {names[0]}, and {other.stored.source} on {names[1]}, whose "
                "weights are others: their adapters are no changes of one model"
            )


def _common(records: Sequence[TrainedOn]) -> TrainedOn:
    """What several records agree on."""
    first = records[0]
    differing = {
        field.name: None
        for field in fields(TrainedOn)
        if any(getattr(record, field.name) != getattr(first, field.name) for record in records)
    }
    return replace(first, **{"started_from": None, **differing})
