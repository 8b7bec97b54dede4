"""Merging, unmerging, and switching adapters off."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from transformers import AutoModelForCausalLM

from lit_lora import LoRAConfig, QuantizationConfig, disable_lora, inject_lora, merge_lora, unmerge_lora
from lit_lora.adapters.layers import adapter_modules
from lit_lora.base.quantize import quantize_
from tests.tiny import language_model

IDS = torch.arange(3, 17).view(2, 7)
CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "ranks": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}
each_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def _model(fields: dict[str, Any], kind: str = "Llama", dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    model = language_model(kind, **sizes).to(dtype)
    torch.manual_seed(2)
    inject_lora(model, LoRAConfig(**{"r": 4, "init_lora_weights": False, **fields}))
    for name, parameter in model.named_parameters():
        if ".copy." in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@each_case
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("unload", [True, False])
def test_merge_equals_unmerged_forward(fields, tied, unload):
    model = _model(fields, tie_word_embeddings=tied)
    before = model(IDS).logits
    merge_lora(model, unload=unload)
    assert (model(IDS).logits - before).abs().max() < 1e-5 * before.abs().max()
    assert bool(list(adapter_modules(model))) is not unload


@pytest.mark.parametrize("kind", ["GPT2", "Gemma3Text"])
def test_merge_fits_transposed_weights_and_scaled_embeddings(kind):
    sizes = {"n_positions": 64} if kind == "GPT2" else {"head_dim": 8}
    targets = ["c_attn", "wte"] if kind == "GPT2" else ["q_proj", "embed_tokens"]
    model = _model({"target_modules": targets}, kind, **sizes)
    before = model(IDS).logits
    merge_lora(model)
    assert (model(IDS).logits - before).abs().max() < 1e-5 * before.abs().max()


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unmerge_restores_every_bit(fields, dtype):
    model = _model(fields, dtype=dtype, tie_word_embeddings=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = model.lm_head.weight is model.get_input_embeddings().weight
    logits = model(IDS).logits
    merge_lora(model, unload=False)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    assert changed
    unmerge_lora(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is shared
    assert torch.equal(model(IDS).logits, logits)


def test_the_sum_is_rounded_once():
    model = _model({"target_modules": ["q_proj"]}, dtype=torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    exact = layer.weight.double() + layer.scaling * layer.lora_B.weight.double() @ layer.lora_A.weight.double()
    merge_lora(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    assert (merged == exact.to(torch.bfloat16)).float().mean() > 0.99


@pytest.mark.parametrize(
    ("fields", "diverges"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    ],
)
def test_a_merged_model_saves_whole_and_stays_tied_where_it_can(fields, diverges, tmp_path):
    model = _model(fields, tie_word_embeddings=True)
    expected = model(IDS).logits
    merge_lora(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not diverges
    assert model.config.tie_word_embeddings is not diverges
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is not diverges
    assert (loaded(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_adapter_that_is_merged_but_kept_can_still_be_unloaded():
    model = _model(CASES["saved"])
    before = model(IDS).logits
    merge_lora(model, unload=False)
    merge_lora(model)
    assert not list(adapter_modules(model))
    assert (model(IDS).logits - before).abs().max() < 1e-5 * before.abs().max()


def test_a_merged_model_is_plain_and_frozen():
    model = _model(CASES["saved"], dtype=torch.bfloat16)
    merge_lora(model)
    reference = language_model()
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in reference.named_modules()]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    inject_lora(model, LoRAConfig(r=2))


@each_case
def test_disabled_adapters_leave_the_base(fields):
    base = language_model()
    model = _model(fields)
    enabled = model(IDS).logits
    with disable_lora(model):
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    assert torch.equal(model(IDS).logits, enabled)
    assert not torch.allclose(enabled, base(IDS).logits)


def test_disabling_ends_with_an_exception_and_nests():
    model = _model(CASES["linear"])
    enabled = model(IDS).logits

    def fail():
        with disable_lora(model), disable_lora(model):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert torch.equal(model(IDS).logits, enabled)


def _merged():
    model = _model(CASES["linear"])
    merge_lora(model, unload=False)
    return model


def _quantized():
    model = language_model(hidden_size=64)
    quantize_(model, QuantizationConfig())
    inject_lora(model, LoRAConfig(r=4))
    return model


def _broken():
    model = _model(CASES["linear"])
    model.model.layers[1].mlp.up_proj.lora_B.weight.data[0, 0] = float("nan")
    return model


def _spoilt(name: str, value: float, dtype: torch.dtype = torch.float32) -> Any:
    def make() -> Any:
        model = _model(CASES["saved"], dtype=dtype)
        model.get_parameter(name).data[0] = value
        return model

    return make


def _changed(change: Any) -> Any:
    """A model whose ``down_proj`` in the first layer is changed before it is adapted."""

    def make() -> Any:
        model = language_model()
        change(model.model.layers[0].mlp.down_proj)
        inject_lora(model, LoRAConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
        return model

    return make


def _scale(layer):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer.__class__ = Scaled


def _disable(model):
    with disable_lora(model):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("make", "act", "message"),
    [
        (language_model, merge_lora, "no adapters to merge"),
        (lambda: _model(CASES["linear"]), unmerge_lora, "no adapter is merged"),
        (_merged, lambda model: merge_lora(model, unload=False), "merged already"),
        (_merged, _disable, "call unmerge_lora before"),
        (_quantized, merge_lora, "quantized weights of model.layers.0.self_attn.q_proj.*load the base model in 16"),
        (_broken, merge_lora, "the adapter holds NaN or infinity in model.layers.1.mlp.up_proj"),
        (
            _spoilt("model.norm.copy.weight", float("inf")),
            merge_lora,
            "the adapter holds NaN or infinity in model.norm",
        ),
        (
            _spoilt("model.layers.0.self_attn.q_proj.base_layer.weight", float("nan")),
            merge_lora,
            "the base holds NaN or infinity in model.layers.0.self_attn.q_proj",
        ),
        (
            _spoilt("model.layers.0.self_attn.q_proj.lora_A.weight", 1e6, torch.float16),
            merge_lora,
            "the sum of base and adapter overflows to NaN or infinity in model.layers.0.self_attn.q_proj",
        ),
        (
            _spoilt("lm_head.copy.weight", 1e6, torch.float16),
            merge_lora,
            "the adapter holds NaN or infinity in lm_head",
        ),
        (_changed(torch.nn.utils.parametrizations.weight_norm), merge_lora, "its weight is computed from others"),
        (
            _changed(lambda layer: torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5)),
            merge_lora,
            "its weight is computed from others",
        ),
        (_changed(_scale), merge_lora, "down_proj: Scaled does more with its weight than multiply"),
        (
            _changed(lambda layer: layer.register_forward_hook(lambda module, inputs, out: out * 2)),
            merge_lora,
            "down_proj: Linear does more with its weight than multiply",
        ),
    ],
)
def test_what_cannot_be_done_is_an_error_and_changes_nothing(make, act, message):
    model = make()
    state = copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        act(model)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in state.items())
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_that_only_looks_does_not_stop_a_merge(dtype):
    seen = []
    model = language_model().to(dtype)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    inject_lora(model, LoRAConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    before = model(IDS).logits
    merge_lora(model)
    assert seen
    assert (model(IDS).logits - before).abs().max() < (1e-5 if dtype == torch.float32 else 0.1) * before.abs().max()
