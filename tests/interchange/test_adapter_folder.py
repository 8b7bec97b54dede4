"""What the verbs make of an adapter's folder: how its base was quantized, which it is, and files that are broken."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_base_model, save_adapter
from lit_lora.__main__ import main
from lit_lora.adapters.layers import lora_layers
from lit_lora.base import base_weight
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.evaluation.load import load
from lit_lora.interchange.adapter_folder import trained_quantization
from lit_lora.tools.export import export
from lit_lora.tools.merge import merge
from tests.tiny import config

NF4_32 = QuantizationConfig(block_size=32)


def _make_base(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config("Llama", vocab_size=260, hidden_size=64)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path):
    return _make_base(tmp_path / "base", 0)


def _make_adapter(base: str, folder: Path, quantization: QuantizationConfig | None) -> str:
    model = load_base_model(base, quantization=quantization)
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    save_adapter(model, folder)
    return str(folder)


@pytest.fixture
def adapter(base, tmp_path):
    return _make_adapter(base, tmp_path / "run" / "adapter", None)


@pytest.mark.parametrize("quantization", [None, NF4_32, QuantizationConfig(bits=8)])
def test_an_adapter_says_how_its_base_was_quantized_whatever_the_run_folder_says(quantization, base, tmp_path):
    adapter = _make_adapter(base, tmp_path / "run" / "adapter", quantization)
    (tmp_path / "run" / "config.yaml").write_text("model: {quantization: {bits: 4, quant_type: fp4}}\n")
    assert trained_quantization(adapter).quantization == quantization
    export(adapter, str(tmp_path / "exported"))
    assert trained_quantization(str(tmp_path / "exported")).quantization == quantization
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert all(isinstance(value, str) for value in metadata.values())
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def test_merge_takes_the_base_as_trained_after_the_config_was_replaced(base, tmp_path):
    adapter = _make_adapter(base, tmp_path / "run" / "adapter", NF4_32)
    (tmp_path / "run" / "config.yaml").write_text("model: {quantization: {bits: 8}}\n")
    merge(adapter, str(tmp_path / "merged"), into="dequantized")
    merge(adapter, str(tmp_path / "told"), into="dequantized", quantization=NF4_32)
    merged, told = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "told"))
    assert merged == told


def test_an_adapter_without_a_note_is_taken_as_its_run_says_and_exported_with_it(adapter, tmp_path):
    _without_metadata(adapter)
    assert trained_quantization(adapter) == (None, "")
    export(adapter, str(tmp_path / "unknown"))
    assert trained_quantization(str(tmp_path / "unknown")) == (None, "")
    (tmp_path / "run" / "config.yaml").write_text(json.dumps({"model": {"quantization": asdict(NF4_32)}}))
    assert trained_quantization(adapter).quantization == NF4_32
    export(adapter, str(tmp_path / "exported"))
    assert trained_quantization(str(tmp_path / "exported")).quantization == NF4_32


def _without_metadata(adapter: str) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(adapter) / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})


@pytest.mark.parametrize(
    ("options", "quantized"),
    [({}, True), ({"full_precision": True}, False), ({"quantization": QuantizationConfig(bits=8)}, True)],
)
def test_inference_quantizes_the_base_as_in_training_unless_told(options, quantized, base, tmp_path, caplog):
    adapter = _make_adapter(base, tmp_path / "adapter", NF4_32)
    with caplog.at_level("INFO", logger="lit_lora"):
        model, _, _ = load(adapter, **options)
    layer = dict(lora_layers(model))["model.layers.0.self_attn.q_proj"].base_layer
    assert base_weight.is_quantized(layer) is quantized
    assert ("quantized to 4 bits, as the adapter was trained" in caplog.text) is (not options)


def test_inference_on_a_base_that_is_stored_quantized_takes_it_as_it_is(base, tmp_path):
    load_base_model(base, quantization=QuantizationConfig()).save_pretrained(tmp_path / "base4")
    byte_tokenizer().save_pretrained(tmp_path / "base4")
    adapter = _make_adapter(base, tmp_path / "adapter", QuantizationConfig())
    with pytest.warns(UserWarning, match="was trained on"):
        load(adapter, base=str(tmp_path / "base4"), other_base=True)


@pytest.mark.filterwarnings("error")
def test_another_base_of_the_same_shape_is_refused_or_gets_a_warning(base, adapter, tmp_path, monkeypatch):
    other = _make_base(tmp_path / "other", 1)
    verbs = {
        "inference": lambda **base: load(adapter, **base),
        "merge": lambda **base: merge(adapter, str(tmp_path / "merged"), **base),
        "export": lambda **base: export(adapter, str(tmp_path / "exported"), **base),
    }
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(base)
    for verb in verbs.values():
        with pytest.raises(ValueError, match=r"was trained on .*base, files:.* and .*other is files:"):
            verb(base=other)
        with pytest.warns(UserWarning, match=r"was trained on .*base, files:.* and .*other is files:"):
            verb(base=other, other_base=True)
    for same in (base, "base", "./base/", str(tmp_path / "link")):
        load(adapter, base=same)


BAD_CONFIGS = [
    (b"[]", "holds [], expected a JSON object"),
    (b"null", "holds nothing, expected a JSON object"),
    (b"{", "is not JSON"),
    (b"\xff\xfe", "is not JSON"),
    (b'{"base_model_name_or_path": 3}', "base_model_name_or_path is 3, expected a name or folder"),
    (b'{"base_model_name_or_path": null}', "names no base model: give --base"),
]
BAD_RUNS = [
    (b"model: llama", "got 'llama' for model, expected a mapping"),
    (b"- 1", "got [1] for model"),
    (b"", "got nothing for model"),
    (b"model: {quantization: nf4}", "quantization is 'nf4', expected null or a mapping of bits"),
    (b"model: {quantization: {bitz: 4}}", "unknown field 'bitz', expected some of bits"),
    (b"model: {quantization: {bits: '4'}}", "bits must be 4 or 8, got '4'"),
    (b"model: {quantization: {block_size: many}}", "block_size must be an integer, got 'many'"),
    (b"model: {quantization: {quant_type: nf3}}", "quant_type must be one of nf4, fp4"),
    (b"model: {quantization: {compute_dtype: half}}", "compute_dtype must be one of auto"),
    (b"model: {quantization: {skip_modules: 3}}", "skip_modules must be a list of names"),
    (b"model: {quantization: [", "expected"),
    (b"\xff\xfe\xff", "not UTF-8"),
]


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 1
    error = capsys.readouterr().err
    message, hint = error.removeprefix("lit-lora: error: ").rstrip().rsplit("\n", 1)
    assert "LIT_LORA_TRACEBACK" in hint
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("content", "expected"), BAD_CONFIGS)
def test_a_broken_adapter_config_is_named_by_every_verb(
    content, expected, adapter, base, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    path = Path(adapter) / "adapter_config.json"
    path.write_bytes(content)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    out = str(tmp_path / "out")
    lines = [["generate", "hi", "--adapter", adapter], ["evaluate", str(data), adapter], ["merge", adapter, out]]
    for arguments in [*lines, ["export", adapter, out]]:
        message = _refused(capsys, *arguments)
        assert str(path) in message, arguments
        assert expected in message, arguments
    if b"base_model" not in content:
        assert str(path) in _refused(capsys, "generate", "hi", "--adapter", adapter, "--base", base)


@pytest.mark.parametrize(("content", "expected"), BAD_RUNS)
def test_a_broken_config_beside_an_adapter_is_named_and_has_a_way_round(content, expected, adapter, tmp_path, capsys):
    _without_metadata(adapter)
    path = tmp_path / "run" / "config.yaml"
    path.write_bytes(content)
    for arguments in (["merge", adapter, str(tmp_path / "out")], ["generate", "hi", "--adapter", adapter]):
        message = _refused(capsys, *arguments)
        assert str(path) in message
        assert expected in message
        assert "--quantization.bits 4" in message
    assert trained_quantization(str(Path(adapter).rename(tmp_path / "away"))) == (None, "")


@pytest.mark.parametrize("note", ["{", '{"bitz": 4}', "3"])
def test_a_broken_note_in_the_weights_file_is_named(note, adapter, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    path = Path(adapter) / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "lit_lora_quantization": note})
    assert str(path) in _refused(capsys, "merge", adapter, str(tmp_path / "out"))
