"""Adapters on parameters: which are matched, ranks of experts, what is refused, what the report says."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lit_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.factored_weight import FactoredWeight
from lit_lora.adapters.grouped_product import _by_grouped_mm, grouped_product
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.parameters import LoRAParameter, targeted_layers
from tests.tiny import language_model

IDS = torch.arange(3, 24).view(3, 7)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def _mixtral(way: str = "grouped_mm") -> Any:
    model = language_model("Mixtral", num_local_experts=4)
    model.set_experts_implementation(way)
    return model


def _config(**fields: Any) -> LoRAConfig:
    return LoRAConfig(**{"r": 4, "target_modules": [], "target_parameters": BOTH, "init_lora_weights": False, **fields})


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
def test_no_tensor_of_the_size_of_all_experts_is_made(way, monkeypatch):
    monkeypatch.setattr(FactoredWeight, "summed", property(lambda _: pytest.fail("experts x out x in")))
    model = _mixtral(way).train()
    inject_lora(model, _config())
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
def test_computed_apart_equals_the_sum(way, dtype, fused):
    got: list[list[torch.Tensor]] = []
    for routed in (True, False):
        torch.manual_seed(1)
        model = _mixtral(way).to(dtype).train()
        inject_lora(model, _config())
        for _, layer in targeted_layers(model):
            layer.routed, layer.has_fast_path = routed, fused
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        got.append([out.loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    for ours, summed in zip(*got, strict=True):
        assert (ours - summed).norm() <= tolerance * summed.norm()


OPERATIONS = {
    "row of an expert": lambda w, x: x @ w[1].t(),
    "negative index": lambda w, x: nn.functional.linear(x, w[-1]),
    "index from a tensor": lambda w, x: nn.functional.linear(x, w[torch.tensor(2)]),
    "experts of a batch": lambda w, x: torch.bmm(w[torch.tensor([0, 3, 3])], x[:3, :, None]),
    "all at once": lambda w, x: x.expand(4, *x.shape) @ w.transpose(1, 2),
    "einsum": lambda w, x: torch.einsum("ti,eoi->teo", x, w),
    "chunks": lambda w, x: [x @ half.mT for half in w.chunk(2, dim=1)][1],
    "a slice": lambda w, x: x @ w[1:3].mT,
    "a view": lambda w, x: x @ w.view(-1, w.shape[-1]).t(),
    "a sum": lambda w, x: x @ (2 * w + 1)[0].mT,
    "a mask": lambda w, x: x @ w[torch.tensor([True, False, True, False])].mT,
    "moved to another type": lambda w, x: x.double() @ w.to(torch.float64)[3].mT,
    "a function of torch": lambda w, x: torch.stack([w, w]).sum(0)[0] @ x.mT,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_whatever_a_module_does_with_its_parameter_is_done_with_the_sum(operation):
    torch.manual_seed(0)
    weight, x = torch.randn(4, 6, 5), torch.randn(7, 5)
    P, Q = torch.randn(4, 2, 6, requires_grad=True), torch.randn(4, 2, 5, requires_grad=True)
    got = operation(FactoredWeight(weight, P, Q, 0.5), x)
    expected = operation(weight + 0.5 * P.mT @ Q, x)
    assert torch.allclose(got, expected, atol=1e-5)
    seed = torch.randn_like(got)
    for ours, theirs in zip(
        torch.autograd.grad((got * seed).sum(), [P, Q]),
        torch.autograd.grad((expected * seed).sum(), [P, Q]),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_rows_after_the_last_expert_are_zero_and_experts_without_rows_get_no_gradient():
    weight, x = torch.randn(3, 5, 6), torch.randn(8, 5)
    P, Q = torch.randn(3, 2, 5, requires_grad=True), torch.randn(3, 2, 6, requires_grad=True)
    out = torch.nn.functional.grouped_mm(x, FactoredWeight(weight, P, Q, 1.0), offs=torch.tensor([2, 2, 6]).int())
    assert not out[6:].any()
    assert out[:6].all()
    out.sum().backward()
    assert [bool(grad.any()) for grad in P.grad] == [True, False, True]


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # PEFT's, wrongly
def test_an_expert_has_a_rank_of_its_own_that_survives_training_and_both_readers(tmp_path):
    torch.manual_seed(2)
    model = _mixtral()
    inject_lora(model, _config(rank_pattern={r"down_proj\.[01]": 1, r"layers\.0\..*gate_up_proj\.3": 6}))
    ranks = {name: layer.expert_ranks for name, layer in targeted_layers(model)}
    assert ranks == {
        "model.layers.0.mlp.experts.down_proj": [1, 1, 4, 4],
        "model.layers.0.mlp.experts.gate_up_proj": [4, 4, 4, 6],
        "model.layers.1.mlp.experts.down_proj": [1, 1, 4, 4],
        "model.layers.1.mlp.experts.gate_up_proj": None,
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    for name, layer in targeted_layers(model):
        deltas = layer.delta_weight()
        got = [int(torch.linalg.matrix_rank(delta, rtol=1e-4)) for delta in deltas]
        assert got == (ranks[name] or [4] * 4)
    save_adapter(model, tmp_path)
    again = _mixtral()
    load_adapter(again, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_mixtral(), tmp_path)
    expected = model(IDS).logits
    assert torch.allclose(again(IDS).logits, expected, atol=1e-5)
    assert torch.allclose(theirs(input_ids=IDS).logits, expected, atol=1e-4)


def test_a_portable_export_has_one_rank_and_no_patterns(tmp_path):
    model = _mixtral()
    inject_lora(model, _config(target_modules=["q_proj"], rank_pattern={"down_proj": 2}, use_rslora=True))
    save_adapter(model, tmp_path, portable=True)
    again = _mixtral()
    report = load_adapter(again, tmp_path)
    assert set(report.adapted.values()) == {4}
    assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_parameters": ["experts.w1"]},
            r"target_parameters entry 'experts.w1' matches no parameter; fused 3-D",
        ),
        ({"target_parameters": ["gate_up_proj", "up_proj"]}, "'up_proj' matches no parameter"),
        ({"target_parameters": ["input_layernorm.weight"]}, r"which is \(32,\).*2 or 3 dimensions"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": ["q_proj"]}, "adapted or trained in full already"),
        ({"modules_to_save": ["mlp"]}, "adapted or trained in full already"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_leaves_the_model(fields, message):
    model = _mixtral()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, _config(**fields))
    assert not list(adapter_modules(model))


def test_dropout_is_refused_when_the_configuration_is_made():
    with pytest.raises(ValueError, match="lora_dropout must be 0 with target_parameters"):
        _config(lora_dropout=0.1)


def test_frozen_experts_are_named_with_what_adapts_them():
    with pytest.warns(UserWarning, match="stay frozen.*target_parameters:") as caught:
        report = inject_lora(_mixtral(), LoRAConfig(r=2))
    named = str(caught[0].message).rpartition("target_parameters: [")[2].rstrip("]").split(", ")
    assert len(report.not_adapted) == 4
    assert "stay frozen" in report.table()
    adapted = inject_lora(_mixtral(), LoRAConfig(r=2, target_parameters=named))  # and then nothing is to be warned of
    assert adapted.not_adapted == {}
    assert "experts:   4 of 4 fused weights adapted, which hold 49,152 of 49,152 parameters" in adapted.table()
    assert adapted.coverage == {"all-linear": 8, "experts.down_proj": 2, "experts.gate_up_proj": 2}


def test_a_module_answers_for_its_attributes_through_the_wrapper():
    model = _mixtral()
    inject_lora(model, _config())
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, LoRAParameter)
    assert (experts.num_experts, experts.intermediate_dim) == (4, 64)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = experts.nonsense


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rank", [2, 8])
def test_what_cuda_gets_is_what_a_cpu_computes(dtype, tolerance, rank):
    """torch's grouped products, for which ranks are filled up to whole 16 bytes."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 16, dtype=dtype, requires_grad=True), torch.randn(3, 16, 24, dtype=dtype)
    P, Q = torch.randn(3, rank, 16, requires_grad=True), torch.randn(3, rank, 24, requires_grad=True)
    offs, seed = torch.tensor([4, 4, 9]).int(), torch.randn(9, 24, dtype=dtype)
    results = []
    for function in (grouped_product, _by_grouped_mm):
        out = function(x, weight, P, Q, offs, 0.5)
        results.append([out.detach(), *torch.autograd.grad((out * seed).sum(), [x, P, Q])])
    for here, there in zip(*results, strict=True):
        assert (here - there).norm() <= tolerance * here.norm()
