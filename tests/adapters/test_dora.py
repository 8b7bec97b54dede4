"""DoRA beyond what the table beside PEFT shows: where it starts, dropout, and what it has no form for."""

from __future__ import annotations

import peft
import pytest
import torch

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.dora import DoRALinear
from lit_lora.adapters.layers import lora_layers
from lit_lora.base.quantize import quantize_
from lit_lora.build import make_trainable
from lit_lora.config import StepConfig
from tests.tiny import language_model

IDS = torch.arange(3, 24).view(3, 7)


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed_tokens"]])
def test_it_starts_as_the_base(targets):
    model = language_model()
    expected = model(IDS).logits
    inject_lora(model, LoRAConfig(r=2, target_modules=targets, use_dora=True))
    assert torch.allclose(model(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_norms_are_those_of_the_sum(quantized):
    model = language_model(hidden_size=64)
    if quantized:
        quantize_(model, QuantizationConfig())
    inject_lora(model, LoRAConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False))
    for _, layer in lora_layers(model):
        assert isinstance(layer, DoRALinear)
        summed = (layer.read_base() + layer.delta_weight()).norm(dim=1)
        assert torch.allclose(layer._norms(), summed, rtol=1e-5)


def test_dropout_falls_on_what_is_added_to_the_base_as_in_peft(tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False, lora_dropout=0.5)
    theirs = peft.get_peft_model(language_model("Qwen2"), config, autocast_adapter_dtype=False).train()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_(torch.randn_like(parameter) * ("magnitude" in name))
    theirs.save_pretrained(tmp_path)
    ours = language_model("Qwen2")
    load_adapter(ours, tmp_path, trainable=True)
    logits = []
    for model in (ours.train(), theirs):
        torch.manual_seed(1)
        logits.append(model(input_ids=IDS).logits)
    assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("step", [StepConfig(), StepConfig(recompute=True), StepConfig(fused_lora=False)])
def test_a_built_model_computes_the_same_however_a_step_is_computed(step):
    losses = []
    for setting in (step, StepConfig(fused_lora=False, recompute_mlp=False)):
        model = language_model()
        torch.manual_seed(1)
        make_trainable(model, LoRAConfig(r=2, use_dora=True, init_lora_weights=False), setting)
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]))
    assert torch.allclose(*losses, atol=1e-4)


def test_a_portable_export_is_refused(tmp_path):
    model = language_model()
    inject_lora(model, LoRAConfig(r=2, use_dora=True))
    with pytest.raises(ValueError, match="no portable form: what DoRA adds"):
        save_adapter(model, tmp_path, portable=True)


def test_experts_are_refused_as_in_peft():
    with pytest.raises(ValueError, match="use_dora does not work with target_parameters"):
        LoRAConfig(use_dora=True, target_parameters=["experts.down_proj"])
