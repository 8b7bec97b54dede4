"""What injection is going to do: which layers get what, checked on the model before anything is touched.

So an error leaves the model as it was. What matches what: ``matching.py``; what carries a plan out: ``inject.py``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from torch import nn

from lit_lora.adapters.direct_reads import direct_reads
from lit_lora.adapters.layer_kinds import wrapper_for
from lit_lora.adapters.layers import LoRALayer, LoRALinear, adapter_modules
from lit_lora.adapters.matching import Matched, match_modules, some
from lit_lora.adapters.module_names import named_modules, plain_name, shared_modules
from lit_lora.adapters.parameters import factor_sizes, nested_name
from lit_lora.adapters.peft_limits import refused_by_peft
from lit_lora.adapters.task_heads import as_pretrained
from lit_lora.adapters.trainable_tokens import DELTA, token_modules
from lit_lora.adapters.trained_biases import biases_to_train
from lit_lora.base import base_weight
from lit_lora.config import LATER_STARTS, OF_THE_WEIGHT, LoRAConfig


@dataclass(frozen=True)
class PlannedLayer:
    """One layer to adapt."""

    module: nn.Module
    r: int
    lora_alpha: float
    kind: type[LoRALayer]
    """Of what takes its place."""
    config: LoRAConfig

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors, by their names in the model."""
        shapes = self.kind.tensor_shapes(self.module, self.config, self.r)
        return {f"{name}.{tensor}": shape for tensor, shape in shapes.items()}


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter to adapt that no layer holds."""

    owner: nn.Module
    parameter_name: str
    wrapper: str
    """What the adapter is called in the model: the name of the owner, and of wrappers around it."""
    r: int
    lora_alpha: float
    expert_ranks: list[int] | None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors, by their names in the model."""
        num_experts, num_in, num_out = factor_sizes(self.owner, getattr(self.owner, self.parameter_name))
        rank = self.r * num_experts
        return {f"{self.wrapper}.lora_A.weight": (rank, num_in), f"{self.wrapper}.lora_B.weight": (num_out, rank)}


@dataclass(frozen=True)
class InjectionPlan:
    """What injection is going to do."""

    config: LoRAConfig
    adapted: dict[str, PlannedLayer]
    parameters: dict[str, PlannedParameter]
    saved: dict[str, nn.Module]
    tokens: dict[str, list[int]]
    """Module -> rows to train."""
    tied_tokens: dict[str, str]
    """Tied head -> the module whose rows it has."""
    coverage: dict[str, int]
    token_owners: dict[str, nn.Module]
    """Modules of ``tokens`` and ``tied_tokens``."""
    biases: dict[str, nn.Parameter]
    """Biases to train, by the names that they will have in the model."""
    ignored: list[str] = field(default_factory=list)
    """Entries that matched nothing, where that is no error."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the adapter, by its name in ``adapter_state_dict``."""
        shapes = {key: shape for name, layer in self.adapted.items() for key, shape in layer.shapes(name).items()}
        for parameter in self.parameters.values():
            shapes |= parameter.shapes()
        shapes |= {name: tuple(bias.shape) for name, bias in self.biases.items()}
        for name, ids in self.tokens.items():
            shapes[f"{name}.{DELTA}"] = (len(ids), self.token_owners[name].get_parameter("weight").shape[1])
        for name, module in self.saved.items():
            state = module.state_dict()
            shapes |= {f"{name}.{plain_name(key)}": tuple(tensor.shape) for key, tensor in state.items()}
        return shapes


def plan_injection(model: nn.Module, config: LoRAConfig, *, from_file: bool = False) -> InjectionPlan:
    """Decide what to wrap, without touching the model.

    Args:
        model: as for :func:`inject_lora`.
        config: as for :func:`inject_lora`.
        from_file: whether the configuration was read from a file, which PEFT may have written. It ignores entries that
            match nothing, so such a file may hold some; the tensors beside it say what it adapts.

    Raises:
        ValueError: as :func:`inject_lora`.
    """
    if not isinstance(config, LoRAConfig):
        raise ValueError(f"config must be a LoRAConfig of lit_lora, got a {type(config).__name__}")
    present = [name for name, _ in adapter_modules(model)]
    if present:
        raise ValueError(
            f"the model already has adapters ({some(present)}): merge them first (merge_lora), take them out "
            "(unload_lora, set_adapter(model, None)), or load another one beside them (load_adapter with a name)"
        )
    _check_without_peft(model)
    found = match_modules(model, config, from_file=from_file)
    if found.problems and not from_file:
        raise ValueError("; ".join(found.problems))
    tokens, tied = _planned_tokens(model, config, found)
    if not (found.adapted or found.saved or found.parameters or tokens):
        raise ValueError("the configuration adapts no layer, nothing would be trainable: check target_modules")
    modules = named_modules(model)
    shared = shared_modules(model)
    owners = [name.rpartition(".")[0] for name in found.parameters]
    refused = {
        name: "the model uses it in several places, and would compute the adapter in one of them"
        for name in (*found.adapted, *found.saved, *owners)
        if id(modules[name]) in shared
    }
    refused |= {} if from_file else refused_by_peft(model, found.adapted)
    _check_served(refused | direct_reads(model, modules, found.adapted))
    adapted = {
        name: PlannedLayer(
            modules[name],
            found.ranks.get(name, config.r),
            found.alphas.get(name, config.lora_alpha),
            wrapper_for(modules[name], config),
            config,
        )
        for name in found.adapted
    }
    _check_start(config, adapted, found.parameters)
    checked = replace(config, lora_dropout=0.0) if from_file else config  # which only training knows of
    _check_served({n: why for n, a in adapted.items() if (why := a.kind.refusal(a.module, checked, a.r)) is not None})
    if config.lora_bias and not from_file:
        _warn_of_biases(adapted)
    saved = {name: modules[name] for name in found.saved}
    config = replace(config, modules_to_save=found.saved or None)
    parameters = _planned_parameters(modules, found, config)
    of_rows = {name: modules[name] for name in (*tokens, *tied)}
    coverage = found.coverage | {f"{name} (rows)": len(ids) for name, ids in tokens.items()}
    wrapped = dict.fromkeys((*found.adapted, *tokens, *tied), 1) | {owner: owners.count(owner) for owner in owners}
    biases = biases_to_train(
        modules, config.bias, adapted=found.adapted, wrapped=wrapped, saved=found.saved, from_file=from_file
    )
    coverage |= {"biases": len(biases)} if biases else {}
    return InjectionPlan(config, adapted, parameters, saved, tokens, tied, coverage, of_rows, biases, found.problems)


def _planned_tokens(
    model: nn.Module, config: LoRAConfig, found: Matched
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Rows to train of each module, and tied heads.

    As PEFT: heads that the model ties to the embedding stay tied.
    """
    if config.trainable_token_indices is None:
        return {}, {}
    pretrained = as_pretrained(model)
    modules = named_modules(model)
    embedding: nn.Module | None = pretrained.get_input_embeddings() if pretrained is not None else None
    name = next((name for name, module in modules.items() if module is embedding), "embed_tokens")
    tied = pretrained is not None and bool(getattr(pretrained.config, "tie_word_embeddings", False))
    tokens, ties = token_modules(modules, config.rows_to_train(name), tied=tied)
    twice = [name for name in (*tokens, *ties) if name in found.adapted or name in found.saved]
    if twice:
        raise ValueError(
            f"trainable_token_indices: {some(twice)} is adapted or trained in full already: train rows of it or all of "
            "it, not both"
        )
    return tokens, ties


def _planned_parameters(
    modules: dict[str, nn.Module], found: Matched, config: LoRAConfig
) -> dict[str, PlannedParameter]:
    """Of one module, the last parameter has the outermost wrapper, as in PEFT."""
    planned: dict[str, PlannedParameter] = {}
    around: dict[str, int] = {}
    for name in reversed(found.parameters):
        owner, _, held = name.rpartition(".")
        r = found.ranks.get(name, config.r)
        ranks = None
        if any(expert.startswith(f"{name}.") for expert in found.ranks):
            num_experts = len(getattr(modules[owner], held))
            ranks = [found.ranks.get(f"{name}.{number}", r) for number in range(num_experts)]
            r = max(ranks)
        alpha = found.alphas.get(name, config.lora_alpha)
        wrapper = nested_name(owner, around.get(owner, 0))
        around[owner] = around.get(owner, 0) + 1
        planned[name] = PlannedParameter(modules[owner], held, wrapper, r, alpha, ranks)
    return {name: planned[name] for name in found.parameters}


def _check_without_peft(model: nn.Module) -> None:
    peft = sys.modules.get("peft.tuners.tuners_utils")
    present = [n for n, m in model.named_modules() if peft is not None and isinstance(m, peft.BaseTunerLayer)]
    if present:
        raise ValueError(
            f"the model already has adapters of PEFT ({some(present)}): call merge_and_unload() of PEFT first, or take "
            "the model without them"
        )


def _check_start(config: LoRAConfig, adapted: dict[str, PlannedLayer], parameters: Collection[str]) -> None:
    """Refuse a start that a layer cannot have."""
    start = config.init_lora_weights
    others = [*parameters, *(name for name, layer in adapted.items() if not issubclass(layer.kind, LoRALinear))]
    if config.freeze_A and others:
        raise ValueError(f"freeze_A is for linear layers, and {some(others)} is none: leave it out")
    if start not in (*OF_THE_WEIGHT, *LATER_STARTS, "orthogonal"):
        return
    if others:
        raise ValueError(f"init_lora_weights {start!r} is for linear layers, and {some(others)} is none: leave it out")
    for name, layer in adapted.items():
        num_out, num_in = base_weight.linear_shape(layer.module)
        most = num_in if config.eva_rho > 1 else min(num_out, num_in)  # its ranks follow from the inputs
        if start != "orthogonal" and layer.r > most:
            raise ValueError(
                f"init_lora_weights {start!r} takes r parts of a weight: {name} has {most}, r is {layer.r}"
            )


def _warn_of_biases(adapted: dict[str, PlannedLayer]) -> None:
    without = [name for name, layer in adapted.items() if getattr(layer.module, "bias", None) is None]
    if without:
        warnings.warn(
            f"lora_bias: {some(without)} has no bias of its own, so that this adapter cannot be merged",
            UserWarning,
            stacklevel=4,
        )


def _check_served(refused: dict[str, str]) -> None:
    if refused:
        examples = {reason: name for name, reason in reversed(refused.items())}
        ends = sorted({name.rpartition(".")[2] for name in refused})
        raise ValueError(
            "; ".join(f"{name} cannot be adapted: {reason}" for reason, name in reversed(examples.items()))
            + f". Leave it out of target_modules, or set exclude_modules: {ends}"
        )
