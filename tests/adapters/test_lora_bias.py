"""A bias of the adapter's own, beyond what the table beside PEFT shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lit_lora import (
    LoRAConfig,
    compress_adapter,
    hotswap_adapter,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from lit_lora.adapters.layers import adapter_modules
from lit_lora.interchange.peft_format import adapter_state_dict
from tests.tiny import language_model

IDS = torch.arange(3, 24).view(3, 7)
FIELDS = {"r": 4, "target_modules": ["q_proj", "k_proj"], "lora_bias": True, "init_lora_weights": False}


def _model(**fields):
    model = language_model("Qwen2")
    inject_lora(model, LoRAConfig(**{**FIELDS, **fields}))
    return model


def test_it_starts_at_zero_and_is_trained():
    model = _model(init_lora_weights=True)
    assert torch.equal(model(IDS).logits, language_model("Qwen2")(IDS).logits)
    biases = {n: p for n, p in model.named_parameters() if n.endswith("lora_B.bias")}
    assert len(biases) == 4
    model(IDS).logits.square().sum().backward()
    assert all(bias.requires_grad and bias.grad.any() for bias in biases.values())


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_merging_adds_it_to_the_bias_and_unmerging_gives_every_bit_back(bias, tmp_path):
    model = _model(bias=bias)
    before, state = model(IDS).logits, {name: t.clone() for name, t in adapter_state_dict(model).items()}
    merge_lora(model, unload=False)
    assert torch.allclose(model(IDS).logits, before, atol=1e-4)
    merged = adapter_state_dict(model)
    assert all(torch.equal(merged[name], tensor) for name, tensor in state.items()), "what is saved is the adapter"
    unmerge_lora(model)
    assert torch.equal(model(IDS).logits, before)
    merge_lora(model)
    assert torch.allclose(model(IDS).logits, before, atol=1e-4)


def test_the_scale_of_another_adapter_and_of_a_compressed_one_is_in_its_bias_too(tmp_path):
    other = _model(lora_alpha=3)
    save_adapter(other, tmp_path / "other")
    model = _model()
    hotswap_adapter(model, tmp_path / "other")
    assert torch.allclose(model(IDS).logits, other(IDS).logits, atol=1e-4)
    base = language_model("Qwen2")
    load_adapter(base, compress_adapter(tmp_path / "other", tmp_path / "small", r=4).folder)
    assert torch.allclose(base(IDS).logits, other(IDS).logits, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*targeted layer of type Linear has no bias")
def test_a_layer_without_a_bias_is_told_before_training_and_not_merged(tmp_path):
    model = language_model()
    with pytest.warns(UserWarning, match=r"lora_bias: .*q_proj.* has no bias of its own.*cannot be merged"):
        inject_lora(model, LoRAConfig(**FIELDS))
    save_adapter(model, tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(language_model(), tmp_path)
    assert torch.allclose(theirs(IDS).logits, model(IDS).logits, atol=1e-4)
    with pytest.raises(ValueError, match=r"cannot merge into .*q_proj: its adapter has a bias"):
        merge_lora(model)
    with pytest.raises(RuntimeError, match="the base layer has no bias"):
        theirs.merge_and_unload()


REFUSED = {
    "DoRA": ({"use_dora": True}, "lora_bias does not work with use_dora"),
    "a start": ({"init_lora_weights": "gaussian"}, "lora_bias does not work with init_lora_weights 'gaussian'"),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, "lora_bias does not work with target_parameters"),
    "an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_bias is not for embeddings"),
}


@pytest.mark.filterwarnings("ignore:.*has no bias")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(("fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_refuses_beside_it_is_refused(fields, message):
    model = language_model("Qwen2")
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**{**FIELDS, **fields}))
    assert not list(adapter_modules(model))
    if "target_parameters" not in fields:  # of this, a Qwen2 has none
        with pytest.raises(ValueError, match="lora_bias"):
            peft.get_peft_model(language_model("Qwen2"), peft.LoraConfig(**{**FIELDS, **fields}))


def test_other_tools_are_not_given_it(tmp_path: Path):
    with pytest.raises(ValueError, match="no portable form: other tools refuse biases"):
        save_adapter(_model(), tmp_path, portable=True)
