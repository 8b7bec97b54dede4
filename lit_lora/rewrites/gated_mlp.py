"""SwiGLU that keeps two of its four wide results for the backward pass.

A gated MLP computes ``down(silu(gate(x)) * up(x))``. Autograd keeps ``gate(x)``, ``up(x)``, ``silu(gate(x))`` and the
product, each as wide as the MLP: more than half of all activations of a decoder layer. The last two follow from the
first two, so the adapted down projection makes them again. That costs two elementwise passes and no matrix product.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.adapters.layers import LoRALinear
from lit_lora.base.shards import gathered_modules
from lit_lora.base.whose_error import ask, raised_here


def recompute_gated_mlps(model: nn.Module, *, trial: bool = True) -> int:
    """Let the SwiGLU MLPs of ``model`` with an adapted ``down_proj`` make their wide results again in the backward.

    Args:
        model: with its adapters.
        trial: change a module only if its own forward, on rows of three magnitudes, equals the formula. Without, going
            by the names of its parts (for tensors without values).

    Returns:
        How many MLPs were changed.
    """
    changed = 0
    for module in gathered_modules(model, _looks_gated):
        if not trial or _equals_formula(module):
            module.forward = MethodType(_forward, module)
            changed += 1
    return changed


def _looks_gated(module: nn.Module) -> bool:
    gate, up, down, activation = (getattr(module, n, None) for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
    drops = any(isinstance(part, nn.Dropout) and part.p for part in module.children())
    return (
        silu
        and not drops
        and isinstance(gate, nn.Module)
        and isinstance(up, nn.Module)
        and isinstance(down, LoRALinear)
    )


@torch.no_grad()
def _equals_formula(module: Any) -> bool:
    down = module.down_proj  # a quantized base has no weight of a type to compute in
    weight = next(p for p in (*down.base_layer.parameters(), *down.parameters()) if p.is_floating_point())
    # The larger ones reach what only large values show, such as a limit on the activation.
    magnitudes = torch.tensor([[1.0], [32.0], [1024.0]], device=weight.device, dtype=weight.dtype)
    x = torch.linspace(-2, 2, 3 * module.down_proj.out_features, device=weight.device, dtype=weight.dtype)
    x = (x.view(3, -1) * magnitudes)[None]
    training, fast = module.training, module.down_proj.has_fast_path
    module.eval()
    module.down_proj.has_fast_path = False  # its kernel rounds less often than the formula does
    try:
        expected, got = ask(module, x), _forward(module, x)
    except Exception as error:
        if raised_here(error):
            raise
        return False  # it takes or gives something else
    finally:
        module.train(training)
        module.down_proj.has_fast_path = fast
    same_type = isinstance(expected, Tensor) and expected.dtype == got.dtype and expected.shape == got.shape
    return same_type and torch.allclose(got, expected, rtol=0, atol=0, equal_nan=True)


def _forward(module: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
    if others or named:  # which it was not tried with
        return type(module).forward(module, x, *others, **named)
    return module.down_proj(module.gate_proj(x), module.up_proj(x))
