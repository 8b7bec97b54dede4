"""Before a run: adapters on fused experts, computed for each expert's own rows, compared with sums with the weight.

``FactoredWeight`` takes the products of a module apart as torch shows them. A kernel of somebody else's would be shown
nothing, and an autograd function of a model's own would give the adapter no gradient. So each class of module with such
adapters computes what it was given in a forward of the model, both ways: values and gradients must agree. Where they do
not, the adapter is added to the weight, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_lora.adapters.layers import lora_layers
from lit_lora.adapters.parameters import LoRAParameter
from lit_lora.adapters.task_heads import as_pretrained
from lit_lora.base.module_state import attributes_kept
from lit_lora.base.shards import device_of_model
from lit_lora.base.whose_error import ask, described, raised_here

_NUM_TOKENS = 32
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Of the norm. What is wrong here, such as an adapter left out, is as large as the result."""


def check_routed_experts(model: nn.Module) -> dict[str, str]:
    """Let those adapters on parameters that cannot be computed apart be added to their weights; says so.

    Args:
        model: with adapters, on its device. One that is not of transformers is left as it is: what it takes is not
            known.

    Returns:
        Module whose adapters are added -> why.
    """
    groups = dict(_wrapped_modules(model))
    pretrained = as_pretrained(model)
    if not groups or pretrained is None:
        return {}
    calls = _calls(pretrained, groups)
    kinds: dict[type, str | None] = {}
    added: dict[str, str] = {}
    for name, wrappers in groups.items():
        kind = type(wrappers[0].owner)
        if kind not in kinds and name in calls:
            kinds[kind] = _differs(wrappers, *calls[name])
        reason = kinds.get(kind)
        if reason is not None:
            added[name] = reason
            for wrapper in wrappers:
                wrapper.routed = False
    for kind, reason in kinds.items():
        rank_zero_info(
            f"Adapted parameters of {kind.__name__}: "
            + ("computed for the rows of each expert" if reason is None else f"added to the weight, since {reason}")
        )
    return added


def _wrapped_modules(model: nn.Module) -> Iterator[tuple[str, list[LoRAParameter]]]:
    """Name of each module with adapted parameters, and the wrappers around it, the outermost first."""
    inner: set[int] = set()
    for name, layer in lora_layers(model):
        if not isinstance(layer, LoRAParameter) or id(layer) in inner:
            continue
        wrappers = [layer]
        while isinstance(wrappers[-1].base_layer, LoRAParameter):
            wrappers.append(wrappers[-1].base_layer)
        inner |= {id(wrapper) for wrapper in wrappers}
        yield name, wrappers


def _calls(model: Any, groups: dict[str, list[LoRAParameter]]) -> dict[str, tuple[Any, Any]]:
    """What each module is given in a forward of a few tokens; nothing where the model does not take such."""
    calls: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Any:
        return lambda _, args, kwargs: calls.setdefault(name, (args, kwargs)) and None

    hooks = [wrappers[0].register_forward_pre_hook(keep(name), with_kwargs=True) for name, wrappers in groups.items()]
    vocab = model.config.get_text_config().vocab_size
    device = device_of_model(model)
    ids = torch.arange(_NUM_TOKENS, device=device).mul_(7).remainder_(vocab)[None]
    try:
        with torch.no_grad(), attributes_kept(model), _random_state_kept(device):
            ask(model, input_ids=ids)
    except Exception as error:  # whatever it needs instead: the trial of the whole model says so
        if raised_here(error):
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _differs(wrappers: list[LoRAParameter], args: Any, kwargs: Any) -> str | None:
    """Why the adapters of one module are not computed apart; None where both ways agree."""
    factors = [factor for wrapper in wrappers for factor in wrapper.factors()]
    values, scalings = [factor.detach().clone() for factor in factors], [wrapper.scaling for wrapper in wrappers]
    device = factors[0].device
    try:
        with torch.no_grad(), _random_state_kept(device):
            for wrapper in wrappers:
                wrapper.start_at_random()
                wrapper.scaling = 1.0
                wrapper.scaling = (wrapper.base_parameter.float().norm() / wrapper.delta_weight().norm()).item()
        apart = _outputs_and_gradients(wrappers, factors, args, kwargs, routed=True)
        summed = _outputs_and_gradients(wrappers, factors, args, kwargs, routed=False)
    except Exception as error:
        if raised_here(error):
            raise
        return f"it does not compute apart ({described(error)})"
    finally:
        with torch.no_grad():
            for factor, value in zip(factors, values, strict=True):
                factor.copy_(value)
        for wrapper, scaling in zip(wrappers, scalings, strict=True):
            wrapper.scaling, wrapper.routed = scaling, True
    tolerance = _TOLERANCES[wrappers[0].base_parameter.dtype]
    for what, got, expected in zip(("values", *(["gradients"] * len(factors))), apart, summed, strict=True):
        if not (got - expected).norm() <= tolerance * expected.norm():
            return f"computed apart, its {what} are others"
    return None


def _outputs_and_gradients(
    wrappers: list[LoRAParameter], factors: list[nn.Parameter], args: Any, kwargs: Any, *, routed: bool
) -> list[Tensor]:
    for wrapper in wrappers:
        wrapper.routed = routed
    with torch.enable_grad(), _random_state_kept(factors[0].device):
        torch.manual_seed(0)
        outs = [
            leaf
            for leaf in tree_leaves(wrappers[0](*args, **kwargs))
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        flat = torch.cat([out.float().flatten() for out in outs])
        weights = torch.linspace(-1, 1, len(flat), device=flat.device)
        gradients = torch.autograd.grad((flat * weights).sum(), factors, materialize_grads=True)
    return [flat.detach(), *(gradient.float() for gradient in gradients)]


def _random_state_kept(device: torch.device) -> Any:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
