"""Ranks that go where inputs vary most: EVA with ``rho`` above 1 (arXiv:2410.07170, section 3.2), as PEFT has it.

The sum of ranks stays as it is configured. A layer gets at most ``rho`` times its own, or none, and is then left out;
its alpha goes along with its rank, so that every layer keeps its scale.

Shapes: I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.adapters.injection_plan import InjectionPlan
from lit_lora.adapters.later_starts import EVA, groups, inputs_of, named_errors
from lit_lora.adapters.layers import lora_layers
from lit_lora.base import base_weight
from lit_lora.config import LoRAConfig


@torch.no_grad()
def redistribute(
    model: nn.Module, plan: InjectionPlan, batches: Iterable[Mapping[str, Any]]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """What the inputs of the base say about the ranks of a plan.

    Returns:
        The configuration with a rank for each layer, and the A that each starts from, ``(R, I)``.

    Raises:
        ValueError: naming a layer whose inputs do not tell so many components.
    """
    config, batches = plan.config, list(batches)
    modules = {name: planned.module for name, planned in plan.adapted.items()}
    most = {
        name: min(round(planned.r * config.eva_rho), base_weight.linear_shape(planned.module)[1])
        for name, planned in plan.adapted.items()
    }
    components: dict[str, tuple[Tensor, Tensor]] = {}
    first: dict[str, str] = {}  # of the layers that share an input, as PEFT: the first one
    for group in groups(modules):
        taken = inputs_of(model, group, batches, EVA)
        owners: dict[int, str] = {}
        for name in group:
            with named_errors(config, name, len(batches)):
                eva = taken[name]
                assert isinstance(eva, EVA)
                first[name] = owners.setdefault(id(eva), name)
                if first[name] == name:
                    sharing = [other for other in group if taken.get(other) is eva]
                    most |= dict.fromkeys(sharing, max(most[other] for other in sharing))
                    components[name] = eva.components(most[name])
    ranks = _ranks(
        {name: components[first[name]][1] for name in modules}, first, sum(each.r for each in plan.adapted.values())
    )
    alphas = {name: plan.adapted[name].lora_alpha * r / plan.adapted[name].r for name, r in ranks.items()}
    kept = {name: r for name, r in ranks.items() if r}
    chosen = replace(
        config,
        target_modules=config.target_modules if len(kept) == len(ranks) else list(kept),
        rank_pattern={name: r for name, r in kept.items() if r != config.r},
        alpha_pattern={name: alphas[name] for name in kept if alphas[name] != config.lora_alpha},
    )
    return chosen, {name: components[first[name]][0][:r] for name, r in kept.items()}


@torch.no_grad()
def start_at_(model: nn.Module, starts: Mapping[str, Tensor]) -> None:
    """Let the layers start from what :func:`redistribute` found."""
    for name, layer in lora_layers(model):
        lora_A, lora_B = layer.factors()
        lora_A.copy_(starts[name])
        lora_B.zero_()
        layer.finish_start()


def _ranks(shares: Mapping[str, Tensor], first: Mapping[str, str], budget: int) -> dict[str, int]:
    """Layer -> how many of its components are among the ``budget`` that explain most."""
    order = [*(name for name in shares if first[name] == name), *(name for name in shares if first[name] != name)]
    owners = [name for name in order for _ in shares[name]]
    ranks = dict.fromkeys(order, 0)
    for index in torch.cat([shares[name] for name in order]).argsort(descending=True)[:budget].tolist():
        ranks[owners[index]] += 1
    for name in order:  # as PEFT: of layers with the same input, the first one has the most
        ahead = first[name]
        if ranks[ahead] < ranks[name]:
            ranks[ahead], ranks[name] = ranks[name], ranks[ahead]
    return {name: ranks[name] for name in shares}
