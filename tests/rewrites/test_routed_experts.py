"""Adapters on experts are computed apart only where a module's own forward shows that it comes to the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lit_lora import LoRAConfig, inject_lora
from lit_lora.adapters.layers import lora_layers
from lit_lora.rewrites.routed_experts import check_routed_experts
from tests.tiny import language_model

IDS = torch.arange(3, 24).view(3, 7)


class _Hidden(torch.autograd.Function):
    """A kernel with a gradient for a tensor, which what stands in its place is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        return None, grad.mT @ ctx.saved_tensors[0] if ctx.needs_input_grad[1] else None


def _without_gradient(self: Any, hidden: torch.Tensor, index: Any, weights: torch.Tensor) -> torch.Tensor:
    gate, up = _Hidden.apply(hidden, self.gate_up_proj[0]).chunk(2, dim=-1)
    return (self.act_fn(gate) * up) @ self.down_proj[1].mT


def _without_value(self: Any, hidden: torch.Tensor, index: Any, weights: torch.Tensor) -> torch.Tensor:
    weight = self.gate_up_proj
    raw = weight if isinstance(weight, torch.Tensor) else weight.weight  # as one that reads memory
    gate, up = (hidden @ raw[0].mT).chunk(2, dim=-1)
    return (self.act_fn(gate) * up) @ self.down_proj[1].mT


def _fails(self: Any, hidden: torch.Tensor, index: Any, weights: torch.Tensor) -> torch.Tensor:
    if not isinstance(self.down_proj, torch.Tensor):
        raise TypeError("down_proj must be a Tensor")
    gate, up = (hidden @ self.gate_up_proj[0].mT).chunk(2, dim=-1)
    return (self.act_fn(gate) * up) @ self.down_proj[1].mT


def _adapted(**fields: Any) -> Any:
    model = language_model("Mixtral", num_local_experts=4, **fields).train()
    config = LoRAConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    inject_lora(model, config)
    return model


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_without_gradient, "gradients are others"),
        (_without_value, "values are others"),
        (_fails, "TypeError: down_proj must be a Tensor"),
    ],
)
def test_a_module_that_computes_out_of_sight_gets_the_sum(forward, reason, monkeypatch):
    monkeypatch.setattr(MixtralExperts, "forward", forward)
    model = _adapted()
    added = check_routed_experts(model)
    assert set(added) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    assert all(reason in why for why in added.values())
    assert not any(layer.routed for _, layer in lora_layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
def test_what_is_right_stays_and_the_check_leaves_no_trace(way, dtype):
    model = _adapted().to(dtype)
    model.set_experts_implementation(way)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    assert check_routed_experts(model) == {}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(layer.routed for _, layer in lora_layers(model))
    assert {layer.scaling for _, layer in lora_layers(model)} == {8.0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
