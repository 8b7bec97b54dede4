"""Adapters on disk: what is written, and everything that is refused."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.layers import adapter_modules
from lit_lora.base.quantize import quantize_
from lit_lora.interchange import adapter_writing
from lit_lora.interchange.peft_format import adapter_state_dict, load_adapter_state_dict
from tests.tiny import language_model

IDS = torch.arange(3, 17).view(2, 7)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FIELDS: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
    "init_lora_weights": False,
}


def _model(**fields: Any) -> Any:
    model = language_model()
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(**{**FIELDS, **fields}))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_adapter(_model(), tmp_path / "adapter", base_model_name="owner/base", model_card="# card")


def _rewrite_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def _rewrite_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_the_folder_holds_sorted_configuration_weights_and_card(folder):
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS]
    text = (folder / CONFIG).read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    assert content["base_model_name_or_path"] == "owner/base"
    assert content["inference_mode"] is True
    assert content["task_type"] == "CAUSAL_LM"
    assert content["peft_type"] == "LORA"
    assert (folder / "README.md").read_text() == "# card"
    with open(folder / WEIGHTS, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"].keys() == {"format", "lit_lora_sha256"}


def test_a_round_trip_is_exact(folder, tmp_path):
    model = language_model()
    load_adapter(model, folder, trainable=True)
    assert torch.equal(model(IDS).logits, _model()(IDS).logits)
    assert sum(p.requires_grad for p in model.parameters()) == len(adapter_state_dict(model))
    save_adapter(model, tmp_path / "again", base_model_name="owner/base")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_a_plain_module_has_no_task(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    save_adapter(model, tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    assert content["task_type"] is None
    assert content["base_model_name_or_path"] is None
    fresh = nn.Sequential(nn.Linear(4, 4))
    fresh.load_state_dict({n.replace("base_layer.", ""): t for n, t in model.state_dict().items() if "lora" not in n})
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_quantized_base_loads_what_it_saved(tmp_path):
    def base():
        model = language_model(hidden_size=64)
        quantize_(model, QuantizationConfig())
        return model

    model = base()
    inject_lora(model, LoRAConfig(**FIELDS))
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def _drop(suffix):
    def change(tensors):
        for name in [n for n in tensors if n.endswith(suffix)]:
            del tensors[name]

    return change


def _add(**tensors):
    return lambda held: held.update({k.replace("__", "."): v for k, v in tensors.items()})


def _reshape(tensors):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name] = torch.zeros(4, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("0.self_attn.q_proj.lora_B.weight"), r"missing 1 tensors \(model.layers.0.self_attn.q_proj.lora_B"),
        (_drop("lora_embedding_A"), r"missing 1 tensors \(model.embed_tokens.lora_embedding_A"),
        (_drop("lm_head.weight"), r"missing 1 tensors \(lm_head.weight"),
        (_drop(""), "missing 7 tensors"),
        (_add(other__lora_A__weight=torch.ones(4, 4)), r"1 unexpected tensors \(other.lora_A.weight"),
        (
            _add(base_model__model__lm_head__lora_magnitude_vector=torch.ones(128)),
            "unexpected tensors .*lm_head.lora_magnitude_vector",
        ),
        (_reshape, r"another base model.*layers.1.self_attn.q_proj.lora_A.weight: got \(4, 48\), .* needs \(4, 32\)"),
        (
            _add(base_model__model__model__embed_tokens__base_layer__weight=torch.zeros(128, 32)),
            "holds its own model.embed_tokens.base_layer.weight, which differs",
        ),
        (
            _add(base_model__model__model__embed_tokens__base_layer__weight=torch.zeros(130, 32)),
            r"made for another base model",
        ),
        (
            _add(base_model__model__model__norm__weight=torch.zeros(32)),
            "holds its own model.norm.weight, which differs",
        ),
        (
            lambda tensors: tensors.update(
                {n.replace("lora_A.", "lora_A.second."): t + 1 for n, t in tensors.items() if "lora_A" in n}
            ),
            "several tensors for .*more than one adapter",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_the_model_is_unchanged(change, message, folder):
    _rewrite_tensors(folder, change)
    model = language_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert not list(adapter_modules(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_of_the_base_that_come_along_are_accepted_if_equal(folder):
    model = language_model()
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    _rewrite_tensors(folder, lambda tensors: tensors.update({name: model.model.embed_tokens.weight.detach().clone()}))
    load_adapter(model, folder)


def test_another_base_model_is_refused(folder):
    model = language_model(hidden_size=48, num_attention_heads=4, head_dim=8)
    with pytest.raises(ValueError, match="another base model, 4 shapes differ"):
        load_adapter(model, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "some"}, "bias must be one of none, all, lora_only"),
        ({"lora_bias": True}, "lora_bias is not for embeddings"),
        ({"target_parameters": "experts.gate_up_proj"}, "target_parameters must be a list"),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: model.embed_tokens is adapted"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens="),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow=3"),
        ({"megatron_config": {"x": 1}}, "megatron_config="),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model"),
        ({"init_lora_weights": "loftq"}, "changes the base model"),
        ({"init_lora_weights": ["gaussian"]}, "changes the base model"),
        ({"r": "8"}, "r must be an integer, got '8'"),
        ({"r": True}, "r must be an integer"),
        ({"r": 0}, "r must be at least 1"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number"),
        ({"target_modules": [], "modules_to_save": None}, "target_modules is missing"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"target_modules": "("}, "no regular expression"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern must be a mapping of names to integers"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be a list of integers or an integer"),
    ],
)
def test_configurations_that_cannot_be_followed_are_refused(changes, message, folder):
    _rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapter(language_model(), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"a_field_of_tomorrow": None},
        {"use_dora": False, "bias": "none", "loftq_config": {}, "use_qalora": False, "corda_config": None},
        {"peft_version": "9.9", "revision": "main", "auto_mapping": {"x": 1}, "qalora_group_size": 16},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"layers_pattern": [], "layers_to_transform": [], "exclude_modules": ""},
    ],
)
def test_fields_that_change_nothing_are_accepted(changes, folder):
    _rewrite_config(folder, **changes)
    model = language_model()
    load_adapter(model, folder)
    assert torch.equal(model(IDS).logits, _model()(IDS).logits)


def _truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def _pickle(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def _pickle_in_disguise(folder):
    torch.save({"x": torch.ones(2)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"adapter_model.safetensors is not a whole safetensors file"),
        (_huge_header, r"adapter_model.safetensors is not a whole safetensors file"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "is not a whole safetensors file"),
        (_pickle_in_disguise, "is not a whole safetensors file"),
        (_pickle, "a pickle, which may run code"),
        (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
        (lambda folder: (folder / CONFIG).unlink(), "holds no adapter_config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json: Expecting"),
        (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe"), "adapter_config.json: .*utf-8"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "expected a JSON object, got list"),
        (lambda folder: (folder / CONFIG).write_text("[" * 100_000), "adapter_config.json"),
    ],
)
def test_damaged_files_are_refused_by_name(damage, message, folder):
    damage(folder)
    model = language_model()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert not list(adapter_modules(model))


@pytest.mark.parametrize("name", ["missing", "../missing", "/missing/folder", "a/b/c", "owner/..", ""])
def test_a_missing_folder_is_named(name):
    if name == "":
        name = "no such folder"
    with pytest.raises(ValueError, match="no adapter folder"):
        load_adapter(language_model(), name)


def test_a_file_in_place_of_the_folder_is_named(folder):
    with pytest.raises(ValueError, match="is a file: expected the folder"):
        load_adapter(language_model(), folder / CONFIG)


def _zero_A(model):
    for _, module in adapter_modules(model):
        for name, parameter in module.named_parameters():
            if name in ("lora_A.weight", "lora_embedding_B"):
                parameter.data.zero_()


def _nan(model):
    model.lm_head.copy.weight.data[3, 3] = float("nan")


@pytest.mark.parametrize(("damage", "message"), [(_zero_A, "every A of the adapter is zero"), (_nan, "NaN .*lm_head")])
def test_a_broken_adapter_is_not_saved_over_a_good_one(damage, message, folder):
    before = (folder / WEIGHTS).read_bytes()
    model = _model()
    damage(model)
    with pytest.raises(ValueError, match=message):
        save_adapter(model, folder)
    assert (folder / WEIGHTS).read_bytes() == before


def test_without_adapters_there_is_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="call inject_lora first"):
        save_adapter(language_model(), tmp_path)


def test_a_full_disk_leaves_the_earlier_adapter(folder, monkeypatch):
    """The second file runs out of space, after the first was written in full."""
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    real, calls = os.fsync, []

    def full_on_the_second(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_on_the_second)
    with pytest.raises(OSError, match=f"{folder}: No space left on device"):
        save_adapter(_model(r=2), folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def test_what_was_written_is_read_back_before_it_replaces_anything(folder, monkeypatch):
    before = (folder / WEIGHTS).read_bytes()
    real = adapter_writing.serialize

    def corrupt(tensors, config, metadata):
        data = bytearray(real(tensors, config, metadata))
        data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(adapter_writing, "serialize", corrupt)
    with pytest.raises(ValueError, match="does not hold what was written"):
        save_adapter(_model(r=2), folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS]


def test_state_is_loaded_strictly_in_both_directions():
    model, other = _model(), _model(init_lora_weights=True)
    state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    load_adapter_state_dict(other, state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    name = "lm_head.weight"
    for changed, message in [
        ({k: v for k, v in state.items() if k != name}, "missing 1 tensors .lm_head.weight"),
        ({**state, "extra": torch.ones(1)}, "1 unexpected tensors .extra"),
        ({**state, name: torch.ones(1)}, r"lm_head.weight: got \(1,\), the model needs \(128, 32\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapter_state_dict(other, {key: torch.zeros_like(t) for key, t in changed.items()})
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_tensors_are_converted_to_the_dtype_of_the_configuration(folder):
    model = language_model()
    load_adapter(model, folder)
    assert {t.dtype for t in adapter_state_dict(model).values()} == {torch.float32}
    half = _model(adapter_dtype="bfloat16")
    load_adapter_state_dict(half, adapter_state_dict(_model()))
    assert {t.dtype for t in adapter_state_dict(half).values()} == {torch.bfloat16}
