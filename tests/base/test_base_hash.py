"""A base is known by all of its bits, as they are stored, whatever is made of them on loading."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_base_model
from lit_lora.base import base_hash
from lit_lora.base.base_hash import hash_files
from tests.tiny import language_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def stored(tmp_path) -> Path:
    folder = tmp_path / "base"
    language_model("Llama", hidden_size=64).save_pretrained(folder)
    return folder


def value(model) -> str:
    return base_hash.base_hash(model).value


def test_any_bit_of_any_tensor_counts(stored):
    path = stored / "model.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    found = {hash_files([path]).value}
    for _ in range(60):
        place, bit = rng.randrange(start, len(whole)), rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        found.add(hash_files([path]).value)
    assert len(found) == 61


def test_names_dtypes_and_shapes_count_and_their_order_does_not(tmp_path):
    one, other = torch.arange(6.0), torch.ones(3)
    variants = [
        {"a": one, "b": other},
        {"b": other, "a": one},
        {"a": one, "c": other},
        {"a": one.reshape(2, 3), "b": other},
        {"a": one.view(torch.int32), "b": other},
        {"a": other, "b": one},
    ]
    found = []
    for number, tensors in enumerate(variants):
        save_file(tensors, tmp_path / f"{number}.safetensors", {"note": str(number)})
        found.append(hash_files([tmp_path / f"{number}.safetensors"]).value)
    assert found[0] == found[1]
    assert len(set(found)) == len(variants) - 1


def test_the_way_of_loading_does_not_count(stored, tmp_path):
    expected = value(load_base_model(str(stored)))
    assert expected.startswith("files:")
    assert value(load_base_model(str(stored), dtype="bfloat16")) == expected
    assert value(load_base_model(str(stored), quantization=QuantizationConfig())) == expected
    language_model("Llama", hidden_size=64).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = load_base_model(str(tmp_path / "shards"))
    inject_lora(model, LoRAConfig(r=4))
    assert value(model) == expected


@pytest.mark.parametrize(
    ("field", "changed", "counts"),
    [
        ("rms_norm_eps", 0.5, True), ("rope_parameters", {"rope_type": "default", "rope_theta": 99.0}, True),
        ("hidden_act", "gelu", True), ("sliding_window", 7, True),
        ("pad_token_id", 3, False), ("transformers_version", "9.9", False), ("use_cache", False, False),
        ("dtype", "float16", False),
    ],
)  # fmt: skip
def test_what_of_the_config_changes_the_forward_pass_counts(stored, field, changed, counts):
    before = value(load_base_model(str(stored), dtype="float32"))
    path = stored / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: changed}, indent=7))
    assert (value(load_base_model(str(stored), dtype="float32")) != before) is counts


def test_a_file_is_hashed_once_and_again_when_it_changed(stored, monkeypatch):
    path = stored / "model.safetensors"
    first = hash_files([path]).value
    with monkeypatch.context() as patch:
        patch.setattr(base_hash, "_hashed", lambda path: pytest.fail("hashed again"))
        assert hash_files([path]).value == first
    times = path.stat()
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    assert hash_files([path]).value != first


@pytest.mark.parametrize("harm", ["damaged", "a file in the way"])
def test_a_cache_that_cannot_be_used_costs_time_and_nothing_else(stored, tmp_path, harm):
    first = hash_files([stored / "model.safetensors"]).value
    cache = tmp_path / "cache" / "hashes"
    if harm == "damaged":
        for path in cache.glob("*.json"):
            path.write_text("[[1")
    else:
        for path in cache.iterdir():
            path.unlink()
        cache.rmdir()
        cache.write_text("")
    assert hash_files([stored / "model.safetensors"]).value == first


def test_a_file_that_is_not_whole_is_an_error_where_the_hash_is_asked_for(stored):
    path = stored / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="ends 100 bytes too early"):
        hash_files([path]).value  # noqa: B018


def test_random_weights_are_known_by_what_makes_them(stored):
    def of(**options) -> str:
        return value(load_base_model(f"random:{stored}", **options))

    assert of() == of()
    assert len({of(), of(seed=1), of(dtype="bfloat16")}) == 3


def test_a_model_that_was_not_loaded_here_is_known_by_its_frozen_tensors():
    model = language_model("Llama")
    inject_lora(model, LoRAConfig(r=4))
    first = value(model)
    assert first.startswith("memory:")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    assert value(model) == first
    model.model.norm.weight.data.view(torch.int32)[3] ^= 1
    assert value(model) != first


def test_what_is_trained_in_the_place_of_a_tensor_does_not_make_it_another_base():
    """Such as the head of a classifier, which starts at random; nor does an A that stays as it started."""

    def of(config: LoRAConfig, change: str) -> str:
        model = language_model("Llama")
        model.get_parameter(change).data.add_(1)
        torch.manual_seed(hash(change))
        inject_lora(model, config)
        return value(model)

    in_full = LoRAConfig(r=4, modules_to_save=["lm_head"], freeze_A=True)
    assert of(in_full, "lm_head.weight") == of(replace(in_full, r=2), "lm_head.weight")
    head = language_model("Llama").lm_head.weight
    assert head is not language_model("Llama").model.embed_tokens.weight
    unchanged = language_model("Llama")
    inject_lora(unchanged, in_full)
    assert of(in_full, "lm_head.weight") == value(unchanged)
    assert of(in_full, "model.norm.weight") != value(unchanged)
    assert of(LoRAConfig(r=4), "lm_head.weight") != of(LoRAConfig(r=4), "model.norm.weight")
