"""The record of an adapter's training: plain JSON in the weights file, read by any version, checked when read."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, save_adapter
from lit_lora.base.trained_on import KEY, VERSION, TrainedOn, complete, forget, from_json, note, noted, read_record
from tests.tiny import language_model

FULL = TrainedOn(
    quantization=QuantizationConfig(bits=8, skip_modules=["q_proj"]),
    dtype="bfloat16",
    revision="v1",
    tokenizer="acme/tiny",
    vocabulary_sha256="ab",
    chat_template_sha256="cd",
    format="messages",
    columns={"messages": "talk"},
    max_length=512,
    train_on_prompt=True,
    turn_end_ids=[7, 2],
    turn_end_strings=["###"],
)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model():
    model = language_model()
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    return model


def _with_metadata(folder: Path, **metadata: str) -> Path:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"format": "pt", **metadata})
    return folder / WEIGHTS


@pytest.mark.parametrize(
    "record", [FULL, TrainedOn(), TrainedOn(quantization="none", train_on_prompt=False, turn_end_strings=[])]
)
def test_a_record_is_written_and_read_back(record, model, tmp_path):
    note(model, **vars(record))
    save_adapter(model, tmp_path)
    assert read_record(tmp_path / WEIGHTS) == record
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        content = json.loads(file.metadata()[KEY])
    assert content.pop("version") == VERSION
    assert content.keys() == {field.name for field in fields(record) if getattr(record, field.name) is not None}


def test_notes_add_up_and_can_be_taken_away(model, tmp_path):
    note(model, dtype="float16")
    note(model, max_length=7)
    complete(model, FULL)
    assert noted(model) == replace(FULL, dtype="float16", max_length=7)
    forget(model)
    save_adapter(model, tmp_path)
    assert read_record(tmp_path / WEIGHTS) == TrainedOn()


@pytest.mark.parametrize(("text", "expected"), [("null", "none"), ('{"bits": 8}', QuantizationConfig(bits=8))])
def test_the_earlier_note_of_the_quantization_alone_is_read(text, expected, model, tmp_path):
    path = _with_metadata(save_adapter(model, tmp_path), lit_lora_quantization=text)
    assert read_record(path) == TrainedOn(quantization=expected)


BROKEN = {
    "{": "Expecting",
    "[]": "expected a JSON object with a version",
    '{"dtype": "float32"}': "expected a JSON object with a version",
    '{"version": true}': "expected a JSON object with a version",
    f'{{"version": {VERSION + 1}}}': "update lit_lora",
    '{"version": 1, "max_length": "512"}': "max_length is '512', expected int",
    '{"version": 1, "max_length": true}': "max_length is True",
    '{"version": 1, "turn_end_ids": [1, "2"]}': "turn_end_ids is",
    '{"version": 1, "columns": {"prompt": 3}}': "columns is",
    '{"version": 1, "quantization": "some"}': "quantization is 'some'",
    '{"version": 1, "quantization": {"bits": 3}}': "bits must be 4 or 8",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_record_is_an_error_that_names_the_file(text, model, tmp_path):
    path = _with_metadata(save_adapter(model, tmp_path), **{KEY: text})
    with pytest.raises(ValueError, match="is damaged") as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert BROKEN[text] in str(caught.value)


def test_a_field_of_another_version_gets_a_warning():
    with pytest.warns(UserWarning, match="says moon_phase, which this version"):
        assert from_json('{"version": 1, "moon_phase": "full", "dtype": "float32"}') == TrainedOn(dtype="float32")
