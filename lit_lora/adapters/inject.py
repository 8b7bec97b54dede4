"""Put adapters into a model: wrap the layers that are named, freeze the rest, and report what happened.

A plan is made and checked first (``injection_plan.py``), so that an error leaves the model as it was.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import nn

from lit_lora.adapters.direct_reads import call_adapted_layers
from lit_lora.adapters.initializers import INITIALIZERS
from lit_lora.adapters.injection_plan import InjectionPlan, plan_injection
from lit_lora.adapters.later_starts import StartFrom, check_start_from, start_later_
from lit_lora.adapters.layers import TrainableCopy
from lit_lora.adapters.matching import layer_indices, ranges, some
from lit_lora.adapters.module_names import named_modules, plain_name, replace_module
from lit_lora.adapters.named_adapters import named
from lit_lora.adapters.parameters import LoRAParameter, fused_experts, targeted_layers
from lit_lora.adapters.redistributed_ranks import redistribute, start_at_
from lit_lora.adapters.tied import tied_pair
from lit_lora.adapters.trainable_tokens import TrainableTokens
from lit_lora.adapters.trained_biases import note_biases
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


def inject_lora(
    model: nn.Module, config: LoRAConfig, *, name: str | None = None, start_from: StartFrom | None = None
) -> InjectionReport:
    """Wrap the layers that the configuration names, in place, and freeze everything else.

    Args:
        model: any module; a transformers model keeps ``generate`` and tied weights.
        config: which layers, of what rank and scale. The head of a classifier of transformers is trained in full too,
            as PEFT does for such tasks, unless ``exclude_modules`` names it.
        name: what the adapter is called among several; where the model has adapters, it lies beside them, for
            ``set_adapter``. None for one alone, which is called "default".
        start_from: what a start of ``config`` is made of. For "eva" and "corda" batches of the training data, each a
            dictionary that the model takes; for "loftq" a function from a layer's name to its weight before it was
            quantized, ``(out, in)``. None for the other starts.

    Returns:
        What was adapted.

    Raises:
        ValueError: if an entry of the configuration matches nothing, a matched layer cannot be adapted, nothing would
            be trainable, or the model has adapters already. The model is then unchanged, but for what ``start_from``
            turned out not to serve.
    """
    check_start_from(config, start_from)
    with named(model, name):
        plan = plan_injection(model, config)
        config.check_for_training()
        starts: dict[str, torch.Tensor] = {}
        if config.eva_rho > 1 and start_from and not callable(start_from):
            config, starts = redistribute(model, plan, start_from)
            plan = plan_injection(model, config)
        report = apply_plan(model, plan)
        if starts:
            start_at_(model, starts)
        elif start_from is not None:
            start_later_(model, config, start_from)
        return report


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
        layer.factors()[0].requires_grad_(not config.freeze_A)
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
