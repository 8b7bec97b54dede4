"""An adapter that is read from a folder, and put on a model.

PEFT loads loosely (a missing tensor only warns, an unexpected one is not reported); here a tensor that is missing,
unexpected or misshapen raises, before the model is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_lora.adapters.inject import InjectionReport, apply_plan
from lit_lora.adapters.injection_plan import InjectionPlan, plan_injection
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.matching import resolve_pattern
from lit_lora.adapters.module_names import plain_name
from lit_lora.adapters.named_adapters import named
from lit_lora.adapters.trained_biases import further_biases, trained_biases
from lit_lora.config import LoRAConfig
from lit_lora.interchange.adapter_state import check_finite, check_state, load_adapter_state_dict, same_tensor
from lit_lora.interchange.added_rows import grown_vocabulary, rows_in_whole_layers, with_added_rows
from lit_lora.interchange.checksum import adapter_checksum, check_adapter
from lit_lora.interchange.peft_config import from_peft_config
from lit_lora.interchange.peft_folder import (
    CONFIG_NAME,
    StoredTensor,
    adapted_in,
    find_folder,
    find_weights,
    read_config,
    read_header,
    read_tensors,
)
from lit_lora.wording import in_words_of


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a file, as far as its configuration and the header of its weights tell."""

    source: str
    """Where it lies, for messages."""
    config: LoRAConfig
    """As it is read from the file."""
    header: Mapping[str, StoredTensor]
    """Key -> tensor."""
    folder: Path | None = None
    """None where the values are not in a folder of PEFT's format: whoever injects it then fills it."""


def read_adapter(folder_or_hub_id: str | Path) -> StoredAdapter:
    """Read what an adapter is, without its values.

    Raises:
        ValueError: if the files are not a LoRA adapter that lit_lora implements.
    """
    folder = find_folder(folder_or_hub_id)
    content = read_config(folder / CONFIG_NAME)
    header = read_header(find_weights(folder))
    try:
        if isinstance(content, dict) and content.get("target_modules") is None:
            # PEFT then has a choice of its own for some architectures; the tensors say which it was.
            content = {**content, "target_modules": adapted_in(header.values())}
        config = _with_ranks_of(from_peft_config(content), header.values())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    return StoredAdapter(str(folder), config, header, folder)


def _with_ranks_of(config: LoRAConfig, header: Iterable[StoredTensor]) -> LoRAConfig:
    """Ranks by the tensors, where several patterns match a layer.

    The first one counts, and PEFT sorts them when it writes, so that its own adapter no longer fits its file. A rank
    that is none of the matching patterns' is left to be refused.
    """
    if len(config.rank_pattern) < 2 or config.target_parameters:
        return config
    header = list(header)
    ends = (".lora_A.weight", ".lora_embedding_A")
    stored = {t.name.removesuffix(end): t.shape[0] for t in header for end in ends if t.name.endswith(end) and t.shape}
    read = resolve_pattern("rank_pattern", config.rank_pattern, stored)
    differing = [name for name, r in read.items() if stored[name] != r]
    matching: dict[str, set[int]] = {name: set() for name in differing}
    for pattern, r in config.rank_pattern.items():
        for name in resolve_pattern("rank_pattern", {pattern: r}, differing):
            matching[name].add(r)
    if not differing or any(stored[name] not in ranks for name, ranks in matching.items()):
        return config
    return replace(config, rank_pattern={re.escape(name): r for name, r in stored.items() if r != config.r})


def load_adapter(
    model: nn.Module, folder_or_hub_id: str | Path, *, name: str | None = None, trainable: bool = False
) -> InjectionReport:
    """Inject and load an adapter that lit_lora or PEFT wrote.

    Args:
        model: the base model that the adapter was trained on. Where it has adapters, this one is loaded beside them,
            for ``set_adapter``.
        folder_or_hub_id: a folder, or the id of a repository on the Hub.
        name: what it is called among several; None for one alone, which is called "default".
        trainable: whether the adapter can be trained further; otherwise it is frozen.

    Returns:
        What was adapted.

    Raises:
        ValueError: if the files are not a LoRA adapter that lit_lora implements, or do not fit the model, naming the
            tensors. The model is then unchanged.
    """
    stored = read_adapter(folder_or_hub_id)
    with named(model, name) as alone:
        report = inject_stored(model, stored, alone=alone)
        if not trainable:
            for _, module in adapter_modules(model):
                module.requires_grad_(False)
            for bias in trained_biases(model).values():
                bias.requires_grad_(False)
    return report


def inject_stored(
    model: nn.Module,
    stored: StoredAdapter,
    config: LoRAConfig | None = None,
    *,
    valueless: bool = False,
    alone: bool = True,
) -> InjectionReport:
    """Put an adapter on a model; it can be trained then.

    Args:
        model: the base that it was trained on, without adapters.
        stored: the adapter.
        config: as it is in the file, with another dropout or dtype; None for that of the file.
        valueless: whether the tensors of the model have no values, so that none are read.
        alone: whether the base is without other adapters, so that it can be given rows for tokens of this one.

    Raises:
        ValueError: as :func:`load_adapter`.
    """
    plan, state = fit_adapter(model, stored, config, valueless=valueless, alone=alone)
    report = apply_plan(model, plan)
    if state is not None:
        load_adapter_state_dict(model, state)
    return report


class FittedAdapter(NamedTuple):
    """An adapter that fits a model, which it is not on yet."""

    plan: InjectionPlan
    state: dict[str, Tensor] | None
    """Its tensors, by their names in the model; None where there are no values."""


def fit_adapter(
    model: nn.Module,
    stored: StoredAdapter,
    config: LoRAConfig | None = None,
    *,
    valueless: bool = False,
    alone: bool = True,
    values: Callable[[str, nn.Parameter], Tensor] = lambda name, parameter: parameter,
) -> FittedAdapter:
    """See that an adapter fits a model, whose vocabulary gets the rows that it needs.

    Args:
        model: as for :func:`inject_stored`, and all that follows.
        stored: the adapter.
        config: of it.
        valueless: whether the tensors of the model have no values.
        alone: whether the base is without other adapters.
        values: of a weight of the base that the adapter brings along, by its name.

    Raises:
        ValueError: as :func:`load_adapter`.
    """
    config, header = config or stored.config, stored.header
    with grown_vocabulary(model, config, header.values(), may_grow=alone) as added:
        try:
            config = with_added_rows(model, config, header.values(), added)
            plan = plan_injection(model, config, from_file=True)
        except ValueError as error:
            raise ValueError(f"{Path(stored.source) / CONFIG_NAME}: {error}") from error
        if config.bias == "all":
            plan = _with_further_biases(model, plan, [tensor.name for tensor in header.values()])
        if stored.folder is None:
            return FittedAdapter(plan, None)
        state = _values(model, plan, stored, added, values, valueless=valueless)
    return FittedAdapter(plan, None if state is None else {name: state[name] for name in plan.shapes()})


def _with_further_biases(model: nn.Module, plan: InjectionPlan, stored: list[str]) -> InjectionPlan:
    biases = plan.biases | further_biases(model, plan.shapes(), stored)
    return replace(plan, biases=biases, coverage=plan.coverage | ({"biases": len(biases)} if biases else {}))


def stored_checksum(stored: StoredAdapter) -> str:
    """SHA-256 of an adapter in a folder, as its own writer keeps it in the file; for any writer's.

    Raises:
        ValueError: if the file is damaged.
    """
    assert stored.folder is not None
    return adapter_checksum(read_tensors(find_weights(stored.folder)), stored.config)


def stored_values(stored: StoredAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter in a folder, by their names in the model.

    Raises:
        ValueError: if the file is damaged, holds several adapters, NaN or infinity.
    """
    assert stored.folder is not None
    weights = find_weights(stored.folder)
    raw = read_tensors(weights)
    state = _by_name(raw, stored.header, stored.source)
    check_adapter(weights, raw, stored.config)
    check_finite(state, stored.source)
    return state


def _values(
    model: nn.Module,
    plan: InjectionPlan,
    stored: StoredAdapter,
    added: range,
    of_model: Callable[[str, nn.Parameter], Tensor],
    *,
    valueless: bool,
) -> dict[str, Tensor] | None:
    """The values of an adapter by their names in the model, which they fit; None for a model without values."""
    assert stored.folder is not None
    expected, header = plan.shapes(), stored.header
    of_base = _weights_of_base(model, header.values(), expected, stored.source)
    shapes = {tensor.name: tensor.shape for tensor in header.values()}
    whole = rows_in_whole_layers(plan, shapes)
    shapes = {name: shape for name, shape in shapes.items() if name not in of_base}
    shapes |= {name: expected[name] for name in whole}
    check_state(expected, shapes, stored.source, hint="; ".join(plan.ignored))
    if valueless:
        return None
    state = stored_values(stored)
    held = {f"{layer}.weight": added for layer in (*plan.tokens, *plan.tied_tokens)}
    _check_equal_base(of_base, of_model, state, header, find_weights(stored.folder), held)
    return state | {name: state[weight][ids] for name, (weight, ids) in whole.items()}


def _by_name(raw: Mapping[str, Tensor], header: Mapping[str, StoredTensor], source: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for key, tensor in raw.items():
        name = header[key].name
        if name in state and not same_tensor(state[name], tensor):
            raise ValueError(f"{source} holds several tensors for {name}: is there more than one adapter in the file?")
        state[name] = tensor
    return state


def _weights_of_base(
    model: nn.Module, stored: Iterable[StoredTensor], expected: Mapping[str, object], source: str
) -> dict[str, nn.Parameter]:
    """Weights of the base that come along, as PEFT writes those of embeddings and heads -> those of the model.

    Raises:
        ValueError: if one has another shape.
    """
    own = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, nn.Parameter] = {}
    for tensor in stored:
        parameter = own.get(tensor.name.replace(".base_layer.", "."))
        if parameter is None or tensor.name in expected:
            continue
        if tensor.shape != tuple(parameter.shape):
            raise ValueError(
                f"{source} was trained with a resized vocabulary: {tensor.name} is {tensor.shape}, the model has "
                f"{tuple(parameter.shape)}. "
                + in_words_of(
                    python=f"Call model.resize_token_embeddings({tensor.shape[0]}) and load again",
                    command_line="Resize the base in Python, save it, and give its folder as the base",
                )
            )
        found[tensor.name] = parameter
    return found


def _check_equal_base(
    of_base: Mapping[str, nn.Parameter],
    values: Callable[[str, nn.Parameter], Tensor],
    state: Mapping[str, Tensor],
    header: Mapping[str, StoredTensor],
    weights: Path,
    held: Mapping[str, range],
) -> None:
    """Refuse another base; ``held`` says which rows of which weight the adapter holds itself."""
    to_copy, rows = [], 0
    for name, of_model in of_base.items():
        parameter = values(name.replace(".base_layer.", "."), of_model)
        stored = state[name].to(device=parameter.device, dtype=parameter.dtype)
        if torch.equal(stored, parameter):
            continue
        differ = (stored != parameter).reshape(len(parameter), -1).any(dim=1).nonzero().flatten().tolist()
        if set(differ) <= set(held.get(name, ())):
            continue
        if differ[0] == 0 or differ != list(range(differ[0], len(parameter))):
            raise ValueError(
                f"{weights.parent} holds its own {name}, which differs from the model's: it was trained on another "
                "base model"
            )
        key = next(key for key, tensor in header.items() if tensor.name == name)
        rows = len(parameter)
        to_copy.append(f"model.get_parameter({name.replace('.base_layer.', '.')!r}).data.copy_(stored[{key!r}])")
    if to_copy:
        raise ValueError(
            f"{weights.parent} was trained with a resized vocabulary, and the tokens that were added are in this file "
            "alone. "
            + in_words_of(
                python="Copy them into the model and load again: "
                f"model.resize_token_embeddings({rows}, mean_resizing=False); "
                f"stored = safetensors.torch.load_file({str(weights)!r}); {'; '.join(to_copy)}. "
                "For the command line, save that model and give its folder as the base",
                command_line="In Python, resize the base's embeddings and copy them into it, save that model, and give "
                "its folder as the base",
            )
        )
