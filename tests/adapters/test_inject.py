"""What injection matches, refuses and reports."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora
from lit_lora.adapters.layers import LoRAEmbedding, LoRALinear, TrainableCopy, adapter_modules, lora_layers
from lit_lora.adapters.matching import ranges
from lit_lora.base.base_weight import is_linear_like
from lit_lora.base.quantize import quantize_
from tests.tiny import language_model

IDS = torch.arange(3, 17).view(2, 7)


def _names(**fields: Any) -> list[str]:
    return list(inject_lora(language_model(), LoRAConfig(**{"r": 4, **fields})).adapted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["q_proj", "qproj"]}, r"target_modules entry 'qproj' matches no layer; linear.*q_proj"),
        ({"target_modules": ["proj"]}, "'proj' matches no layer"),
        ({"target_modules": r"q_proj"}, "'q_proj' matches no module; the whole path has to match, such as 'model"),
        ({"target_modules": r"(q_proj"}, "is no regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["head"]}, "exclude_modules entry 'head' matches no module"),
        ({"target_modules": ["q_proj"], "exclude_modules": r"head"}, "exclude_modules 'head' matches no module"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["head"]}, "'head' matches no module; .*lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["rotary_emb"]}, "which has no parameters"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp", "up_proj"]}, "inside of other modules"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["layers"]}, "a ModuleList, which is never called"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, r"\[7\] match no targeted .*present: 0-1"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"}, "of 'h' present: none"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "rank_pattern entry 'v_proj' .*in q_proj"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"proj": 2}}, "alpha_pattern entry 'proj' matches no"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 2}}, "rank_pattern: .* is no regular expression"),
        ({"target_modules": ["self_attn"]}, "matches model.layers.0.self_attn .*of type LlamaAttention, which cannot"),
        ({"target_modules": ["input_layernorm"]}, "LlamaRMSNorm"),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*q_proj"}, "has no effect"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "'lm_head' has no effect"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights must be .*gaussian.*got 'lora_ga'"),
        ({"target_modules": ["q_proj"], "lora_alpha": 0}, "lora_alpha must be above 0 to train, got 0"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\] must be above 0"),
    ],
)
def test_what_has_no_effect_is_an_error_and_changes_nothing(fields, message):
    model = language_model()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**{"r": 4, **fields}))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_unmatched_entry_is_named_at_once():
    with pytest.raises(ValueError, match=r"'a_proj'.*'b_proj'.*'c_head'"):
        _names(target_modules=["a_proj", "b_proj", "q_proj"], modules_to_save=["c_head"])


def test_overlapping_patterns_of_one_value_are_fine():
    model = language_model()
    patterns = {"q_proj": 2, r"layers\.0\..*": 2}
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern=patterns))
    assert {name[6:]: layer.r for name, layer in lora_layers(model)} == {
        "layers.0.self_attn.q_proj": 2,
        "layers.0.self_attn.v_proj": 2,
        "layers.1.self_attn.q_proj": 2,
        "layers.1.self_attn.v_proj": 4,
    }


def test_a_list_entry_matches_whole_parts_of_the_path_only():
    assert _names(target_modules=["layers.1.self_attn.k_proj", "o_proj"]) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.o_proj",
    ]


def test_a_saved_module_keeps_adapters_out_of_itself():
    model = language_model()
    report = inject_lora(model, LoRAConfig(r=4, modules_to_save=["layers.1.mlp", "lm_head"]))
    assert not any("layers.1.mlp" in name for name in report.adapted)
    assert len(report.adapted) == 11
    assert report.saved == ["model.layers.1.mlp", "lm_head"]


def test_all_linear_leaves_out_the_head_of_a_transformers_model_only():
    assert not any("lm_head" in name for name in _names(target_modules="all-linear"))
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert list(inject_lora(plain, LoRAConfig(r=2)).adapted) == ["0", "2"]


def test_all_linear_skips_the_projection_that_attention_never_calls():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    assert list(inject_lora(copy.deepcopy(model), LoRAConfig(r=2)).adapted) == ["up"]
    with pytest.raises(ValueError, match="of type NonDynamicallyQuantizableLinear, which cannot be adapted"):
        inject_lora(model, LoRAConfig(r=2, target_modules=["out_proj"]))


def test_only_the_adapter_is_trainable_and_the_report_counts_it():
    model = language_model(tie_word_embeddings=True)
    num_base = sum(p.numel() for p in model.parameters())
    fields: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    report = inject_lora(model, LoRAConfig(r=4, **fields))
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(trainable) == [
        "lm_head.copy.weight",
        "model.embed_tokens.lora_embedding_A",
        "model.embed_tokens.lora_embedding_B",
        *(f"model.layers.{i}.self_attn.q_proj.lora_{half}.weight" for i in (0, 1) for half in "AB"),
    ]
    assert report.num_trainable == sum(trainable.values())
    assert report.num_total == num_base + report.num_trainable
    table = report.table()
    assert f"{report.num_trainable:,} of {report.num_total:,}" in table
    assert report.coverage == {"q_proj": 2, "embed_tokens": 1, "lm_head (in full)": 1}
    assert report.coverage_per_layer == {0: 1, 1: 1}
    assert "0-1: 1 adapted each" in table
    assert "lm_head" in table


def test_4_bit_weights_count_as_what_they_stand_for():
    plain, quantized = language_model(hidden_size=64), language_model(hidden_size=64)
    quantize_(quantized, QuantizationConfig())
    config = LoRAConfig(r=4)
    assert inject_lora(quantized, config).num_total == inject_lora(plain, config).num_total


def test_fused_experts_are_named_as_not_adapted():
    model = language_model("Mixtral", num_local_experts=4)
    with pytest.warns(UserWarning, match=r"not adapted: .* parameters in 4 fused 3-D weights .*experts"):
        report = inject_lora(model, LoRAConfig(r=4))
    assert len(report.not_adapted) == 4
    assert "not adapted" in report.table()


def test_a_second_injection_is_refused():
    model = language_model()
    inject_lora(model, LoRAConfig(r=4))
    with pytest.raises(ValueError, match="already has adapters"):
        inject_lora(model, LoRAConfig(r=4))


def test_adapters_of_peft_are_not_adapted():
    model = language_model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match=r"has adapters of PEFT \(model.layers.0.self_attn.q_proj.*merge_and_unload"):
        inject_lora(model, LoRAConfig(r=4))


def test_a_configuration_of_another_library_is_refused():
    with pytest.raises(ValueError, match="config must be a LoRAConfig of lit_lora, got a LoraConfig"):
        inject_lora(language_model(), peft.LoraConfig(target_modules=["q_proj"]))  # type: ignore[arg-type]


def test_a_quantized_module_cannot_be_trained_in_full():
    model = language_model(hidden_size=64)
    quantize_(model, QuantizationConfig())
    with pytest.raises(ValueError, match="'down_proj' is quantized"):
        inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_kept(training):
    model = language_model().train(training)
    inject_lora(model, LoRAConfig(r=4, modules_to_save=["norm"]))
    assert all(module.training is training for module in model.modules())


def test_a_fresh_adapter_changes_nothing():
    model = language_model()
    before = model(IDS).logits
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_adapters_have_the_dtype_of_the_configuration_and_the_model_keeps_its_own(dtype, base_dtype):
    model = language_model().to(base_dtype)
    fields: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"]}
    inject_lora(model, LoRAConfig(r=4, adapter_dtype=dtype, **fields))
    for parameter in model.parameters():
        assert parameter.dtype == (getattr(torch, dtype) if parameter.requires_grad else base_dtype)
    logits = model(IDS, labels=IDS).logits
    assert logits.dtype == base_dtype
    logits.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_saved_module_gets_its_own_weight_where_it_was_tied():
    model = language_model(tie_word_embeddings=True)
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert isinstance(model.lm_head, TrainableCopy)
    model.lm_head.copy.weight.data.add_(1)
    assert torch.equal(model.lm_head.base_layer.weight, model.model.embed_tokens.weight)
    model.tie_weights()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_transformers_still_finds_and_ties_the_weights():
    model = language_model(tie_word_embeddings=True)
    inject_lora(model, LoRAConfig(r=4, target_modules=["lm_head", "embed_tokens"]))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, LoRAEmbedding)
    assert isinstance(head, LoRALinear)
    assert head.weight is embedding.weight is embedding.base_layer.weight
    assert (head.in_features, head.out_features, embedding.num_embeddings) == (32, 128, 128)
    head.base_layer.weight = nn.Parameter(torch.zeros(128, 32))
    model.tie_weights()
    assert head.base_layer.weight is embedding.weight
    assert "weight" not in dict(head.named_parameters(recurse=False))


@pytest.mark.parametrize("target", ["embed_tokens", "q_proj"])
def test_generation_works_with_a_cache(target):
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, target_modules=[target], init_lora_weights=False))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


def test_a_saved_block_still_answers_for_its_attributes():
    model = language_model("Gemma3Text", head_dim=8)
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]))
    assert model.model.layers[1].mlp.gate_proj.in_features == 32
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.model.layers[1].mlp.no_such_thing


def test_nothing_is_computed_on_the_meta_device():
    with torch.device("meta"):
        model = language_model_without_data()
    report = inject_lora(model, LoRAConfig(r=4, modules_to_save=["lm_head"]))
    assert len(report.adapted) == 14
    assert all(parameter.is_meta for parameter in model.parameters())


def test_fake_tensors_go_through():
    with FakeTensorMode():
        model = language_model_without_data()
        fields: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
        inject_lora(model, LoRAConfig(r=4, **fields))
        assert all(isinstance(parameter, FakeTensor) for parameter in model.parameters())
        model(torch.ones(2, 7, dtype=torch.long)).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def language_model_without_data() -> Any:
    from transformers import AutoModelForCausalLM

    from tests.tiny import config

    return AutoModelForCausalLM.from_config(config())


def test_building_adapters_draws_random_numbers_for_the_start_alone():
    layer = nn.Linear(6, 4)
    torch.manual_seed(0)
    inject_lora(nn.Sequential(layer), LoRAConfig(r=2))
    after = torch.rand(())
    torch.manual_seed(0)
    torch.empty(2, 6).uniform_()
    assert torch.equal(torch.rand(()), after)


def test_a_wrapped_model_can_be_copied():
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, modules_to_save=["lm_head"], init_lora_weights=False))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
    assert len(list(adapter_modules(twin))) == 15


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 60)))
def test_ranges_read_back_as_the_numbers(numbers):
    read = set()
    for part in filter(None, ranges(numbers).split(", ")):
        first, _, last = part.partition("-")
        read |= set(range(int(first), int(last or first) + 1))
    assert read == numbers


def test_a_linear_layer_that_gives_something_else_is_no_target():
    """Such as Llama 4's router: a linear layer by inheritance, which returns two tensors."""

    class Router(nn.Linear):
        def forward(self, x):
            scores = super().forward(x)
            return scores.softmax(-1), scores

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict({"router": Router(4, 2), "scaled": Scaled(4, 4), "plain": nn.Linear(4, 4)})
    assert [name for name, module in model.items() if is_linear_like(module)] == ["scaled", "plain"]
    inject_lora(model, LoRAConfig(r=2))
    assert [name for name, _ in lora_layers(model)] == ["scaled", "plain"]
    with pytest.raises(ValueError, match="router"):
        inject_lora(
            nn.ModuleDict({"router": Router(4, 2), "plain": nn.Linear(4, 4)}), LoRAConfig(target_modules=["router"])
        )
