"""The part of a plan that concerns some of a model's modules, where the model never has all of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from lit_lora.adapters.injection_plan import InjectionPlan
from lit_lora.adapters.module_names import named_modules


def part_of_plan(model: nn.Module, plan: InjectionPlan, inside: Callable[[str], bool]) -> InjectionPlan:
    """The plan for the modules of these names, as they are now.

    Args:
        model: that the plan was made for; modules may have been replaced by others of the same names.
        plan: for all of it.
        inside: whether a module's name is that of one that is wanted.
    """
    modules = named_modules(model)
    return replace(
        plan,
        adapted={name: replace(layer, module=modules[name]) for name, layer in plan.adapted.items() if inside(name)},
        parameters={
            name: replace(parameter, owner=modules[name.rpartition(".")[0]])
            for name, parameter in plan.parameters.items()
            if inside(name)
        },
        saved={name: modules[name] for name in plan.saved if inside(name)},
        tokens={name: ids for name, ids in plan.tokens.items() if inside(name)},
        tied_tokens={name: source for name, source in plan.tied_tokens.items() if inside(name)},
        token_owners={name: modules[name] for name in plan.token_owners if inside(name)},
        biases={
            name: model.get_parameter(plain)
            for name in plan.biases
            if inside(plain := name.replace(".base_layer.", "."))
        },
    )
