"""Put adapters into a model: wrap the layers that are named, freeze the rest, and report what happened.

A plan is made and checked first, so that an error leaves the model as it was. What matches what: ``matching.py``.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lit_lora.adapters.direct_reads import call_adapted_layers, direct_reads
from lit_lora.adapters.dora import MAGNITUDE, DoRAEmbedding, DoRALinear
from lit_lora.adapters.initializers import INITIALIZERS
from lit_lora.adapters.layers import LoRAEmbedding, LoRALayer, LoRALinear, TrainableCopy, adapter_modules
from lit_lora.adapters.matching import Matched, layer_indices, match_modules, ranges, some
from lit_lora.adapters.module_names import named_modules, plain_name, replace_module, shared_modules
from lit_lora.adapters.parameters import LoRAParameter, factor_sizes, fused_experts, nested_name, targeted_layers
from lit_lora.adapters.peft_limits import refused_by_peft
from lit_lora.adapters.task_heads import as_pretrained
from lit_lora.adapters.tied import tied_pair
from lit_lora.adapters.trainable_tokens import DELTA, TrainableTokens, token_modules
from lit_lora.adapters.trained_biases import biases_to_train, note_biases
from lit_lora.base import base_weight
from lit_lora.base.quantized_forward import prepare_base_layer
from lit_lora.config import LoRAConfig


@dataclass(frozen=True)
class InjectionReport:
    """What injection did to a model."""

    config: LoRAConfig
    """The configuration as it was applied."""

    adapted: dict[str, int]
    """Adapted layer, or parameter -> rank."""

    saved: list[str]
    """Modules that are trained in full."""

    coverage: dict[str, int]
    """Entry of ``target_modules``, ``target_parameters`` or ``modules_to_save`` -> how many it matched."""

    coverage_per_layer: dict[int, int]
    """Index of the decoder layer -> number of adapted layers in it."""

    not_adapted: dict[str, tuple[int, ...]]
    """Fused 3-D weights (experts of a mixture) that stay frozen without an adapter -> shape."""

    experts: dict[str, tuple[int, ...]]
    """Fused 3-D weights with an adapter -> shape."""

    num_trainable: int
    """Trainable parameters."""

    num_total: int
    """All parameters, those in 4 bits counted as what they stand for."""

    def table(self) -> str:
        """The report as text."""
        share = 100 * self.num_trainable / self.num_total
        lines = [
            f"trainable: {self.num_trainable:,} of {self.num_total:,} parameters ({share:.3f}%)",
            f"adapted:   {len(self.adapted)} layers, rank {ranges(self.adapted.values())}",
        ]
        width = max(len(entry) for entry in self.coverage)
        lines += [f"  {entry:<{width}}  {count}" for entry, count in self.coverage.items()]
        if self.coverage_per_layer:
            counts = sorted(set(self.coverage_per_layer.values()))
            each = "each" if len(counts) == 1 else "per layer"
            lines.append(
                f"in decoder layers {ranges(self.coverage_per_layer)}: {' or '.join(map(str, counts))} adapted {each}"
            )
        if self.experts:
            num_adapted, num_frozen = _num_weights(self.experts), _num_weights(self.not_adapted)
            lines.append(
                f"experts:   {len(self.experts)} of {len(self.experts) + len(self.not_adapted)} fused weights adapted, "
                f"which hold {num_adapted:,} of {num_adapted + num_frozen:,} parameters"
            )
        if self.saved:
            lines.append(f"trained in full: {', '.join(self.saved)}")
        if self.not_adapted:
            lines.append(_fused_warning(self.not_adapted))
        return "\n".join(lines)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer to adapt."""

    module: nn.Module
    r: int
    lora_alpha: float
    dora: bool = False

    @property
    def kind(self) -> type[LoRALayer]:
        """Of what takes its place."""
        if isinstance(self.module, nn.Embedding):
            return DoRAEmbedding if self.dora else LoRAEmbedding
        return DoRALinear if self.dora else LoRALinear

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors, by their names in the model."""
        if isinstance(self.module, nn.Embedding):
            lengths = {f"{name}.{MAGNITUDE}": (self.module.embedding_dim,)} if self.dora else {}
            return lengths | {
                f"{name}.lora_embedding_A": (self.r, self.module.num_embeddings),
                f"{name}.lora_embedding_B": (self.module.embedding_dim, self.r),
            }
        num_out, num_in = base_weight.linear_shape(self.module)
        lengths = {f"{name}.{MAGNITUDE}": (num_out,)} if self.dora else {}
        return lengths | {f"{name}.lora_A.weight": (self.r, num_in), f"{name}.lora_B.weight": (num_out, self.r)}


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


def inject_lora(model: nn.Module, config: LoRAConfig) -> InjectionReport:
    """Wrap the layers that the configuration names, in place, and freeze everything else.

    Args:
        model: any module; a transformers model keeps ``generate`` and tied weights.
        config: which layers, of what rank and scale. The head of a classifier of transformers is trained in full too,
            as PEFT does for such tasks, unless ``exclude_modules`` names it.

    Returns:
        What was adapted.

    Raises:
        ValueError: if an entry of the configuration matches nothing, a matched layer cannot be adapted, nothing would
            be trainable, or the model has adapters already. The model is then unchanged.
    """
    plan = plan_injection(model, config)
    config.check_for_training()
    return apply_plan(model, plan)


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
            f"the model already has adapters ({some(present)}): merge them first (merge_lora) or take a fresh model"
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
            modules[name], found.ranks.get(name, config.r), found.alphas.get(name, config.lora_alpha), config.use_dora
        )
        for name in found.adapted
    }
    saved = {name: modules[name] for name in found.saved}
    config = replace(config, modules_to_save=found.saved or None)
    parameters = _planned_parameters(modules, found, config)
    of_rows = {name: modules[name] for name in (*tokens, *tied)}
    coverage = found.coverage | {f"{name} (rows)": len(ids) for name, ids in tokens.items()}
    wrapped = dict.fromkeys((*found.adapted, *tokens, *tied), 1) | {owner: owners.count(owner) for owner in owners}
    biases = biases_to_train(modules, config.bias, adapted=found.adapted, wrapped=wrapped, saved=found.saved)
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


def _check_served(refused: dict[str, str]) -> None:
    if refused:
        examples = {reason: name for name, reason in reversed(refused.items())}
        ends = sorted({name.rpartition(".")[2] for name in refused})
        raise ValueError(
            "; ".join(f"{name} cannot be adapted: {reason}" for reason, name in reversed(examples.items()))
            + f". Leave it out of target_modules, or set exclude_modules: {ends}"
        )


def apply_plan(model: nn.Module, plan: InjectionPlan) -> InjectionReport:
    """Carry out a plan of :func:`plan_injection` on the model that it was made for."""
    num_base = base_weight.num_weights(model)
    put_adapters_(model, plan)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fused = {plain_name(name): tuple(weight.shape) for name, weight in fused_experts(model).items()}
    if fused:
        warnings.warn(_fused_warning(fused), UserWarning, stacklevel=3)
    per_layer: dict[int, int] = {}
    for index in layer_indices([*plan.adapted, *plan.parameters]).values():
        per_layer[index] = per_layer.get(index, 0) + 1
    return InjectionReport(
        config=plan.config,
        adapted={name: planned.r for name, planned in plan.adapted.items()}
        | {name: planned.r for name, planned in plan.parameters.items()},
        saved=list(plan.saved),
        coverage=plan.coverage,
        coverage_per_layer=dict(sorted(per_layer.items())),
        not_adapted=fused,
        experts={
            name: tuple(layer.base_parameter.shape)
            for name, layer in targeted_layers(model)
            if isinstance(layer, LoRAParameter) and layer.base_parameter.ndim == 3
        },
        num_trainable=num_trainable,
        num_total=num_base + num_trainable,
    )


def put_adapters_(model: nn.Module, plan: InjectionPlan) -> None:
    """Carry out a plan, without a report."""
    config = plan.config
    modules, pair = named_modules(model), tied_pair(model)
    for name, module in modules.items():
        prepare_base_layer(name, module)  # those that get no adapter too: gradients pass through them
    model.requires_grad_(False)
    for name, planned in plan.adapted.items():
        layer = planned.kind(planned.module, config, r=planned.r, lora_alpha=planned.lora_alpha)
        INITIALIZERS[config.init_lora_weights](layer)
        layer.finish_start()
        layer.train(planned.module.training)
        replace_module(modules, name, layer)
    for name, parameter in plan.parameters.items():
        place = name.rpartition(".")[0]
        inner = modules[place]
        outer = LoRAParameter(
            inner,
            parameter.parameter_name,
            config,
            r=parameter.r,
            lora_alpha=parameter.lora_alpha,
            expert_ranks=parameter.expert_ranks,
        )
        INITIALIZERS[config.init_lora_weights](outer)
        outer.train(inner.training)
        replace_module(modules, place, outer)
        modules[place] = outer
    rows: dict[str, TrainableTokens] = {}
    for name, ids in plan.tokens.items():
        rows[name] = TrainableTokens(plan.token_owners[name], config, ids)
    for name, source in plan.tied_tokens.items():
        rows[name] = TrainableTokens(plan.token_owners[name], config, plan.tokens[source], tied_to=rows[source])
    for name, tokens in rows.items():
        tokens.train(plan.token_owners[name].training)
        replace_module(modules, name, tokens)
    copies = {name: TrainableCopy(module, config) for name, module in plan.saved.items()}
    for name, copied in copies.items():
        copied.train(plan.saved[name].training)
        replace_module(modules, name, copied)
    if pair is not None and config.ensure_weight_tying and copies.keys() >= set(pair):
        copies[pair[1]].copy.weight = copies[pair[0]].copy.weight
    note_biases(model, plan.biases)
    call_adapted_layers(model)


def _fused_warning(fused: dict[str, tuple[int, ...]]) -> str:
    ends = sorted({".".join(name.split(".")[-2:]) for name in fused})
    return (
        f"not adapted: {_num_weights(fused):,} parameters in {len(fused)} fused 3-D weights ({some(fused)}), such as "
        "experts of a mixture, stay frozen: target_modules names layers, and these are none. To adapt them too, set "
        f"target_parameters: [{', '.join(ends)}]"
    )


def _num_weights(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())
