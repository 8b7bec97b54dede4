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
from lit_lora.adapters.initializers import INITIALIZERS
from lit_lora.adapters.layers import LoRAEmbedding, LoRALayer, LoRALinear, TrainableCopy, adapter_modules
from lit_lora.adapters.matching import layer_indices, match_modules, ranges, some
from lit_lora.adapters.module_names import named_modules, plain_name, replace_module, shared_modules
from lit_lora.adapters.peft_limits import refused_by_peft
from lit_lora.base import base_weight
from lit_lora.base.quantized_forward import prepare_base_layer
from lit_lora.config import LoRAConfig


@dataclass(frozen=True)
class InjectionReport:
    """What injection did to a model."""

    config: LoRAConfig
    """The configuration as it was applied."""

    adapted: dict[str, int]
    """Adapted layer -> rank."""

    saved: list[str]
    """Modules that are trained in full."""

    coverage: dict[str, int]
    """Entry of ``target_modules`` or ``modules_to_save`` -> number of modules that it matched."""

    coverage_per_layer: dict[int, int]
    """Index of the decoder layer -> number of adapted layers in it."""

    not_adapted: dict[str, tuple[int, ...]]
    """Fused 3-D weights (experts of a mixture), which no adapter can wrap -> shape."""

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

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors, by their names in the model."""
        if isinstance(self.module, nn.Embedding):
            return {
                f"{name}.lora_embedding_A": (self.r, self.module.num_embeddings),
                f"{name}.lora_embedding_B": (self.module.embedding_dim, self.r),
            }
        num_out, num_in = base_weight.linear_shape(self.module)
        return {f"{name}.lora_A.weight": (self.r, num_in), f"{name}.lora_B.weight": (num_out, self.r)}


@dataclass(frozen=True)
class InjectionPlan:
    """What injection is going to do."""

    config: LoRAConfig
    adapted: dict[str, PlannedLayer]
    saved: dict[str, nn.Module]
    coverage: dict[str, int]
    ignored: list[str] = field(default_factory=list)
    """Entries that matched nothing, where that is no error."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the adapter, by its name in ``adapter_state_dict``."""
        shapes = {key: shape for name, layer in self.adapted.items() for key, shape in layer.shapes(name).items()}
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
    if not found.adapted and not found.saved:
        raise ValueError("the configuration adapts no layer, nothing would be trainable: check target_modules")
    modules = named_modules(model)
    shared = shared_modules(model)
    refused = {
        name: "the model uses it in several places, and would compute the adapter in one of them"
        for name in (*found.adapted, *found.saved)
        if id(modules[name]) in shared
    }
    refused |= {} if from_file else refused_by_peft(model, found.adapted)
    _check_served(refused | direct_reads(model, modules, found.adapted))
    adapted = {
        name: PlannedLayer(modules[name], found.ranks.get(name, config.r), found.alphas.get(name, config.lora_alpha))
        for name in found.adapted
    }
    saved = {name: modules[name] for name in found.saved}
    config = replace(config, modules_to_save=found.saved or None)
    return InjectionPlan(config, adapted, saved, found.coverage, found.problems)


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
    config = plan.config
    num_base = base_weight.num_weights(model)
    modules = named_modules(model)
    for name, module in modules.items():
        prepare_base_layer(name, module)  # those that get no adapter too: gradients pass through them
    model.requires_grad_(False)
    for name, planned in plan.adapted.items():
        layer: LoRALayer
        if isinstance(planned.module, nn.Embedding):
            layer = LoRAEmbedding(planned.module, config, r=planned.r, lora_alpha=planned.lora_alpha)
        else:
            layer = LoRALinear(planned.module, config, r=planned.r, lora_alpha=planned.lora_alpha)
        INITIALIZERS[config.init_lora_weights](layer)
        layer.train(planned.module.training)
        replace_module(modules, name, layer)
    for name, module in plan.saved.items():
        wrapper = TrainableCopy(module, config)
        wrapper.train(module.training)
        replace_module(modules, name, wrapper)
    call_adapted_layers(model)

    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fused = _fused_weights(model)
    if fused:
        warnings.warn(_fused_warning(fused), UserWarning, stacklevel=3)
    per_layer: dict[int, int] = {}
    for index in layer_indices(plan.adapted).values():
        per_layer[index] = per_layer.get(index, 0) + 1
    return InjectionReport(
        config=config,
        adapted={name: planned.r for name, planned in plan.adapted.items()},
        saved=list(plan.saved),
        coverage=plan.coverage,
        coverage_per_layer=dict(sorted(per_layer.items())),
        not_adapted=fused,
        num_trainable=num_trainable,
        num_total=num_base + num_trainable,
    )


def _fused_weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        plain_name(name): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and not parameter.requires_grad and min(parameter.shape) > 1
    }


def _fused_warning(fused: dict[str, tuple[int, ...]]) -> str:
    count = sum(torch.Size(shape).numel() for shape in fused.values())
    return (
        f"not adapted: {count:,} parameters in {len(fused)} fused 3-D weights ({some(fused)}), such as experts of a "
        "mixture; adapters only wrap linear layers and embeddings"
    )
