"""Biases of the base that are trained along, beyond what the table beside PEFT shows."""

from __future__ import annotations

import pytest
import torch

from lit_lora import LoRAConfig, disable_lora, inject_lora, merge_lora, save_adapter
from lit_lora.adapters.layers import adapter_modules
from tests.tiny import language_model

IDS = torch.arange(3, 24).view(3, 7)


def _trained(**fields):
    model = language_model("Qwen2")
    report = inject_lora(model, LoRAConfig(**{"r": 2, "target_modules": ["q_proj"], "bias": "all", **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, report


def test_switched_off_the_biases_are_those_of_the_base_and_come_back():
    model, report = _trained()
    assert report.coverage["biases"] == 6
    expected = model(IDS).logits
    with disable_lora(model):
        assert torch.equal(model(IDS).logits, language_model("Qwen2")(IDS).logits)
    assert torch.equal(model(IDS).logits, expected)


def test_a_merged_model_keeps_them_and_a_second_adapter_starts_from_there():
    model, _ = _trained()
    expected = model(IDS).logits
    merge_lora(model)
    assert torch.allclose(model(IDS).logits, expected, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"]))
    with disable_lora(model):
        assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


def test_a_setting_without_effect_and_a_form_without_biases_are_refused(tmp_path):
    model = language_model()
    with pytest.raises(ValueError, match="bias 'lora_only' has no effect: no adapted layer of the model has a bias"):
        inject_lora(model, LoRAConfig(r=2, bias="lora_only"))
    assert not list(adapter_modules(model))
    with pytest.raises(ValueError, match="no portable form: other tools refuse biases"):
        save_adapter(_trained()[0], tmp_path, portable=True)
