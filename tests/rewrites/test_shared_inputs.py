"""Layers that read the same tensor, computed together: which they are, and that nothing but the cost changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_lora import LoRAConfig, inject_lora
from lit_lora.adapters import layers as layers_module
from lit_lora.adapters.layers import LoRALinear, lora_layers
from lit_lora.kernels.cuda_way import as_on_cuda
from lit_lora.rewrites.recompute import checkpoint_layers
from lit_lora.rewrites.shared_inputs import share_inputs
from tests.tiny import language_model

IDS = torch.arange(3, 27).view(2, 12)


def _model(kind: str = "Llama", **fields: Any) -> Any:
    lora = fields.pop("lora", {})
    model = language_model(kind, std=0.1, **fields).to(torch.bfloat16)
    inject_lora(model, LoRAConfig(**{"r": 4, "init_lora_weights": False, **lora}))
    return model.train()


def _groups(model: nn.Module) -> set[tuple[str, ...]]:
    names = {id(layer): name.rsplit(".", 1)[-1] for name, layer in lora_layers(model)}
    shared = {id(layer.shared_input): layer.shared_input for _, layer in lora_layers(model) if layer.shared_input}  # type: ignore[attr-defined]
    return {tuple(names[id(layer)] for layer in group._layers) for group in shared.values()}


def _loss_and_gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    with as_on_cuda():
        loss = model(input_ids=IDS, use_cache=False).logits.float().square().mean()
        loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    ("kind", "lora", "expected"),
    [
        ("Llama", {}, {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        ("Qwen2", {}, {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        ("Llama", {"target_modules": ["q_proj", "v_proj", "up_proj"]}, {("q_proj", "v_proj")}),
        ("Phi3", {}, set()),  # one layer for queries, keys and values
    ],
)
def test_layers_that_read_the_same_tensor_are_found(kind, lora, expected):
    model = _model(kind, lora=lora)
    assert share_inputs(model) == 2 * len(expected)
    assert _groups(model) == expected


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_loss_and_gradients_stay_what_they_were(kind, recomputed):
    model = _model(kind)
    exact = copy.deepcopy(model).double()
    expected, plain = _loss_and_gradients(exact), _loss_and_gradients(model)
    share_inputs(model)
    if recomputed:
        checkpoint_layers(model)
    got = _loss_and_gradients(model)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        error, before = (float((g[name].double() - value).norm() / value.norm()) for g in (got, plain))
        assert error < max(2e-3, 1.25 * before), name


def test_the_first_computes_for_all(monkeypatch):
    calls: list[int] = []
    own = layers_module.lora_linears
    monkeypatch.setattr(
        layers_module, "lora_linears", lambda x, each, *args: calls.append(len(each)) or own(x, each, *args)
    )
    model = _model()
    _loss_and_gradients(model)
    assert calls == []
    share_inputs(model)
    _loss_and_gradients(model)
    assert calls == [3, 2] * 2


class _Two(nn.Module):
    """A pair of adapted layers that are called with the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            LoRALinear(nn.Linear(8, n, dtype=torch.bfloat16).requires_grad_(False), LoRAConfig(r=2), r=2, lora_alpha=4)
            for n in (6, 4)
        )
        for layer in (self.first, self.second):
            layer.start_at_random()
            layer.shared_input = layers_module.SharedInput([self.first, self.second])
        self.second.shared_input = self.first.shared_input


def _changed_in_place(two: _Two, x: Tensor) -> Tensor:
    two.first(x)
    return two.second(x.mul_(2))


def _another_tensor(two: _Two, x: Tensor) -> Tensor:
    two.first(x)
    return two.second(x * 2)


def _alone(two: _Two, x: Tensor) -> Tensor:
    return two.second(x * 2)


def _twice(two: _Two, x: Tensor) -> Tensor:
    x = x * 2
    two.first(x)
    two.second(x)
    return two.second(x)


def _disabled(two: _Two, x: Tensor) -> Tensor:
    x = x * 2
    two.second.enabled = False
    two.first(x)
    two.second.enabled = True
    return two.second(x)


@pytest.mark.parametrize("use", [_changed_in_place, _another_tensor, _alone, _twice, _disabled])
def test_any_other_use_computes_the_layer_itself(use):
    two = _Two()
    x = torch.randn(3, 8).bfloat16()
    expected = two.second(x * 2)
    with as_on_cuda():
        got = use(two, x.clone())
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_a_disabled_layer_gives_its_base_also_after_the_first_has_run():
    two = _Two()
    x = torch.randn(3, 8).bfloat16()
    with as_on_cuda():
        two.first(x)
        two.second.enabled = False
        assert torch.equal(two.second(x), two.second.base_layer(x))


def test_in_full_precision_every_layer_sees_to_itself():
    two = _Two().float()
    x = torch.randn(3, 8)
    two.first(x)
    assert not two.first.shared_input._ready


def test_a_copied_model_shares_within_itself():
    model = _model()
    share_inputs(model)
    copied = copy.deepcopy(model)
    own = {id(layer) for _, layer in lora_layers(copied)}
    for _, layer in lora_layers(copied):
        if layer.shared_input is not None:
            assert {id(member) for member in layer.shared_input._layers} <= own
    assert torch.equal(_loss_and_gradients(copied)["loss"], _loss_and_gradients(model)["loss"])


def test_a_model_that_is_no_language_model_is_left_alone():
    assert share_inputs(_Two()) == 0


class _NeedsMore(nn.Module):
    """Without sound a layer is handed nothing, as a model of speech does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input_ids: Tensor, use_cache: bool, sound: Tensor | None = None) -> Tensor:
        return self.layer(sound)


class _TakesSoundAlone(_NeedsMore):
    def forward(self, sound: Tensor) -> Tensor:  # type: ignore[override]
        return self.layer(sound)


@pytest.mark.parametrize("decoder", [_NeedsMore, _TakesSoundAlone])
def test_a_model_that_needs_other_inputs_is_left_alone(decoder):
    model = _model()
    model.get_decoder = lambda: decoder(model.model.layers[0].mlp.up_proj)
    assert share_inputs(model) == 0


def test_an_error_of_ours_is_raised(monkeypatch):
    model = _model()
    monkeypatch.setattr(layers_module, "lora_linear", None)  # as a slip of the pen would
    with pytest.raises(TypeError, match="NoneType"):
        share_inputs(model)
