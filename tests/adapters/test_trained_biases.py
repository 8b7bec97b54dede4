"""Biases of the base that are trained along, beyond what the table beside PEFT shows."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_lora import LoRAConfig, disable_lora, inject_lora, load_adapter, merge_lora, save_adapter
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.trained_biases import trained_biases
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


class Named(nn.Module):
    """With parameters that are called a bias, or nearly so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.bias, self.bias_table = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.held = nn.ParameterDict({"bias": torch.randn(8), "relative_bias": torch.randn(8)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.q_proj(x)) + self.bias + self.bias_table + self.held["bias"] * self.held["relative_bias"]
        return self.attention(x, x, x, need_weights=False)[0]


BASES = {
    "names": Named,
    "GptOss": lambda: language_model("GptOss", num_local_experts=4, head_dim=8),
    "GPT2": lambda: language_model("GPT2"),
}
TARGETS = {"names": ["q_proj"], "GptOss": ["q_proj"], "GPT2": ["c_attn"]}


def _by_peft(kind: str, which: str, folder) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of PEFT's file, and the parameters of the base that it trains, by our names."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS[kind], bias=which, init_lora_weights=False)
    model = peft.get_peft_model(BASES[kind](), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    trained = {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}
    return load_file(folder / "adapter_model.safetensors"), {name for name in trained if "lora_" not in name}


@pytest.mark.filterwarnings("ignore:not adapted")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("which", ["all", "lora_only"])
@pytest.mark.parametrize("kind", BASES)
def test_the_biases_are_those_of_peft_whatever_else_has_bias_in_its_name(kind, which, tmp_path):
    expected, trained = _by_peft(kind, which, tmp_path / "theirs")
    ours = BASES[kind]()
    inject_lora(ours, LoRAConfig(r=2, target_modules=TARGETS[kind], bias=which))
    assert set(trained_biases(ours)) == trained
    assert {n for n, p in ours.named_parameters() if p.requires_grad and "lora_" not in n} == trained
    save_adapter(ours, tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == expected.keys()
    read = BASES[kind]()
    load_adapter(read, tmp_path / "theirs")
    for name, bias in trained_biases(read).items():
        assert torch.equal(bias, expected[f"base_model.model.{name}"])


@pytest.mark.filterwarnings("ignore:not adapted")
@pytest.mark.parametrize("kind", ["names", "GptOss"])
def test_what_peft_0_18_took_for_biases_is_read_and_written_again(kind, tmp_path):
    """It trained and wrote whatever has "bias" in its name."""
    tensors, trained = _by_peft(kind, "all", tmp_path)
    further = {n: p.detach() + 0.1 for n, p in BASES[kind]().named_parameters() if "bias" in n}
    further = {f"base_model.model.{n}": p for n, p in further.items() if "q_proj" not in n}
    assert len(further.keys() - tensors.keys()) == {"names": 5, "GptOss": 4}[kind]
    save_file(tensors | further, tmp_path / "adapter_model.safetensors")
    ours = BASES[kind]()
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    report = load_adapter(ours, tmp_path, trainable=True)
    assert report.coverage["biases"] == len(trained_biases(ours)) > len(trained)
    for name, bias in trained_biases(ours).items():
        assert bias.requires_grad
        assert torch.equal(bias, (tensors | further)[f"base_model.model.{name}"])
    save_adapter(ours, tmp_path / "again")
    written = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert written.keys() == (tensors | further).keys()
    with disable_lora(ours):
        for name, parameter in before.items():
            assert name not in dict(ours.named_parameters()) or torch.equal(ours.get_parameter(name), parameter)
