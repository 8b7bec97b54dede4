"""SwiGLU made again in the backward pass: same numbers, half of the MLP's activations."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_lora import LoRAConfig, inject_lora
from lit_lora.adapters.functional import lora_linear
from lit_lora.adapters.layers import lora_layers
from lit_lora.rewrites.gated_mlp import recompute_gated_mlps
from tests.tiny import language_model


def _model(kind="Llama", lora=None, **fields):
    model = language_model(kind, **fields)
    inject_lora(model, LoRAConfig(**{"r": 4, "init_lora_weights": False, **(lora or {})}))
    return model


def _loss_and_gradients(model):
    model.zero_grad()
    loss = model(input_ids=torch.arange(24).view(2, 12), use_cache=False).logits.square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.5}, {"target_modules": ["down_proj"]}], ids=str)
def test_loss_and_gradients_stay_what_they_were(kind, lora):
    model = _model(kind, lora)
    torch.manual_seed(0)
    loss, gradients = _loss_and_gradients(model)
    assert recompute_gated_mlps(model) == 2
    torch.manual_seed(0)
    other_loss, other_gradients = _loss_and_gradients(model)
    torch.testing.assert_close(other_loss, loss)
    assert other_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    gate, up, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (4,)))
    weight = torch.randn(4, 5, dtype=torch.float64)
    lora_A, lora_B = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (4, 2)))

    def ours(gate, up, bias, lora_A, lora_B):
        return lora_linear(gate, weight, bias, lora_A, lora_B, 0.5, up)

    assert torch.autograd.gradcheck(ours, (gate, up, bias, lora_A, lora_B))
    expected = lora_linear(F.silu(gate) * up, weight, bias, lora_A, lora_B, 0.5)
    torch.testing.assert_close(ours(gate, up, bias, lora_A, lora_B), expected)


def test_neither_the_activation_nor_the_product_is_kept():
    def kept(model):
        shapes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x)
        with hooks:
            model(input_ids=torch.arange(12)[None], use_cache=False)
        return sum(shape == (1, 12, 64) for shape in shapes)  # as wide as the MLP

    model = _model(num_hidden_layers=1)
    before = kept(model)
    recompute_gated_mlps(model)
    assert (before, kept(model)) == (4, 2)


def test_mlps_of_another_formula_are_left_alone():
    assert recompute_gated_mlps(_model("Gemma2", head_dim=8, query_pre_attn_scalar=8)) == 0  # GELU
    assert recompute_gated_mlps(_model(lora={"target_modules": ["q_proj"]})) == 0  # keeps no product anyway

    model = _model()
    kind = type(model.model.layers[0].mlp)

    class Doubled(kind):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Doubled
    assert recompute_gated_mlps(model) == 1

    model.model.layers[1].mlp.dropout = nn.Dropout(0.1)
    assert recompute_gated_mlps(model) == 0


def test_each_mlp_is_tried_by_itself():
    model = _model()
    model.model.layers[1].mlp.scale = 2

    class Scaled(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return getattr(self, "scale", 1) * super().forward(x)

    for layer in model.model.layers:
        layer.mlp.__class__ = Scaled
    assert recompute_gated_mlps(model) == 1


def test_a_limit_that_only_large_values_reach_is_seen():
    model = _model()

    class Limited(type(model.model.layers[0].mlp)):
        def forward(self, x):
            gate, up = self.gate_proj(x).clamp(max=200.0), self.up_proj(x).clamp(-200.0, 200.0)
            return self.down_proj(self.act_fn(gate) * up)

    model.model.layers[0].mlp.__class__ = Limited
    assert recompute_gated_mlps(model) == 1


@pytest.mark.parametrize("error", [KeyError, AttributeError, AssertionError])
def test_whatever_an_mlp_raises_leaves_it_alone(error):
    model = _model()

    class Strange(type(model.model.layers[0].mlp)):
        def forward(self, x):
            raise error("it wants more than its input")

    model.model.layers[0].mlp.__class__ = Strange
    assert recompute_gated_mlps(model) == 1


def test_a_disabled_adapter_acts_as_the_base():
    model = _model()
    recompute_gated_mlps(model)
    ids = torch.arange(12)[None]
    for _, layer in lora_layers(model):
        layer.enabled = False
    base = language_model()
    torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
