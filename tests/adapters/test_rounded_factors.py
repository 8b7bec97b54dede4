"""Factors that are rounded once for many tokens: the same answers to the last bit, and gone where they were needed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, merge_lora
from lit_lora.adapters import layers as layers_module
from lit_lora.adapters.layers import LoRALinear
from lit_lora.adapters.merge import disable_lora
from lit_lora.adapters.mixed_batch import adapters_by_row
from lit_lora.adapters.named_adapters import set_adapter
from lit_lora.adapters.rounded_factors import rounded_factors
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.base.quantize import quantize_
from lit_lora.data.chats.turn_end import TurnEnd
from lit_lora.kernels.cuda_way import as_on_cuda
from lit_lora.language_model.generation import complete
from tests.adapters.test_kinds_in_half_precision import KINDS
from tests.tiny import language_model

IDS = torch.arange(3, 27).view(2, 12)
AS_EVER = {
    "DoRA",
    "DoRA, dropout",
    "DoRA, MLP alone",
    "DoRA, embedding",
    "biases of its own",
    "biases of its own, dropout",
}


def adapted(kind: str = "Qwen2", *, dtype: torch.dtype = torch.bfloat16, lora: Any = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = language_model(kind, std=0.1, **fields).to(dtype)
    inject_lora(model, LoRAConfig(r=4, **(lora or {})))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight, std=0.1)
    return model.eval()


def held(model: Any) -> list[LoRALinear]:
    return [each for each in model.modules() if isinstance(each, LoRALinear) and each.rounded is not None]


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_computes_the_same_bits(kind, on_cuda):
    model = adapted(lora=KINDS[kind])
    with as_on_cuda() if on_cuda else nullcontext(), torch.no_grad():
        expected = model(IDS).logits
        with rounded_factors(model):
            assert bool(held(model)) == (kind not in AS_EVER)
            assert torch.equal(model(IDS).logits, expected)
            assert torch.equal(model(IDS[:1, :1]).logits, adapted(lora=KINDS[kind])(IDS[:1, :1]).logits)
        assert not held(model)


@pytest.mark.parametrize(
    ("kind", "fields", "dtype", "is_held"),
    [
        ("Llama", {}, torch.bfloat16, True),
        ("Llama", {}, torch.float16, True),
        ("Llama", {}, torch.float32, False),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, torch.bfloat16, False),  # Conv1D
        ("GPTNeoX", {}, torch.bfloat16, True),
    ],
)
def test_layers_of_a_base_compute_the_same_bits(kind, fields, dtype, is_held):
    model = adapted(kind, dtype=dtype, lora={"target_modules": "all-linear"}, **fields)
    with torch.no_grad():
        expected = model(IDS).logits
        with rounded_factors(model):
            assert bool(held(model)) == is_held
            assert torch.equal(model(IDS).logits, expected)


def test_a_quantized_base_computes_as_ever():
    model = language_model("Llama", std=0.1).to(torch.bfloat16)
    quantize_(model, QuantizationConfig(bits=4, block_size=32))
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    with rounded_factors(model.eval()):
        assert not held(model)


def test_what_is_switched_off_or_folded_in_is_left_out():
    model = adapted()
    with torch.no_grad():
        with disable_lora(model):
            base = model(IDS).logits
            with rounded_factors(model):
                assert not held(model)
        with rounded_factors(model), disable_lora(model):
            assert torch.equal(model(IDS).logits, base)
        merge_lora(model)
        with rounded_factors(model):
            assert not held(model)


def test_gradients_are_those_of_the_parameters():
    model = adapted()
    with rounded_factors(model):
        model(IDS).logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_they_are_let_go_after_an_error_and_a_change_counts():
    model = adapted()
    with torch.no_grad():
        with pytest.raises(KeyError), rounded_factors(model):
            raise KeyError
        assert not held(model)
        before = model(IDS).logits
        for layer in (each for each in model.modules() if isinstance(each, LoRALinear)):
            layer.lora_B.weight.mul_(2)
        with rounded_factors(model):
            assert not torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("dtype", "autocast", "is_held"),
    [
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.bfloat16, torch.bfloat16, True),
    ],
    ids=str,
)
def test_under_autocast_they_are_held_for_the_type_that_it_computes_in(dtype, autocast, is_held):
    model = adapted(dtype=dtype)
    with torch.autocast("cpu", autocast), torch.no_grad():
        expected = model(IDS).logits
        with rounded_factors(model):
            assert bool(held(model)) == is_held
            assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("names", [None, ["default"] * 3, ["default", "other", None]])
def test_answers_are_given_with_them_and_are_the_same(names, temperature, monkeypatch):
    model = adapted(vocab_size=260)
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False), name="other")
    set_adapter(model.eval(), "default")
    prompts, used = [[5, 9, 40], [7], [88, 3]], []

    def answers() -> list[str]:
        torch.manual_seed(3)
        found = complete(
            model, byte_tokenizer(), prompts, end=TurnEnd([], ()), max_new_tokens=6, temperature=temperature,
            adapters=names,
        )  # fmt: skip
        return [each.text for each in found]

    original = layers_module.rounded_linear
    monkeypatch.setattr(layers_module, "rounded_linear", lambda *args: used.append(1) or original(*args))
    got = answers()
    assert used
    monkeypatch.setattr("lit_lora.language_model.generation.rounded_factors", lambda model: nullcontext())
    assert got == answers()
    assert not held(model)
    with adapters_by_row(model, ["other"]):
        assert not held(model)
