"""An adapter whose weights or config changed on disk is refused; what changes nothing is not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_lora.interchange.checksum import adapter_checksum
from tests.tiny import language_model


@pytest.fixture
def folder(tmp_path):
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, target_modules=["q_proj"]))
    return save_adapter(model, tmp_path / "adapter")


def test_a_changed_bit_in_a_tensor_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(language_model(), folder)


@pytest.mark.parametrize(
    ("field", "value", "fine"),
    [
        ("lora_alpha", 17, False),
        ("use_rslora", True, False),
        ("lora_dropout", 0.5, True),
        ("base_model_name_or_path", "elsewhere", True),
    ],
)
def test_a_changed_config_is_refused_if_it_changes_the_function(folder, field, value, fine):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    if fine:
        load_adapter(language_model(), folder)
    else:
        with pytest.raises(ValueError, match="is damaged"):
            load_adapter(language_model(), folder)


def test_an_adapter_without_checksum_loads(folder):
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"format", "lit_lora_sha256"}
    save_file(load_file(path), path, metadata={"format": "pt"})
    load_adapter(language_model(), folder)


def test_a_field_that_came_later_changes_no_checksum_where_it_is_not_set():
    """Written by a version whose configuration had neither ``target_parameters`` nor ``trainable_token_indices``."""
    earlier = "90ae09d39c0719386e1d9689b35bcac43900594b00b9f15657eb68d28b0b71a8"
    tensors = {"a": torch.arange(4.0)}
    assert adapter_checksum(tensors, LoRAConfig(r=4)) == earlier
    assert adapter_checksum(tensors, LoRAConfig(r=4, target_parameters=["experts.down_proj"])) != earlier
    assert adapter_checksum(tensors, LoRAConfig(r=4, trainable_token_indices=[3])) != earlier
