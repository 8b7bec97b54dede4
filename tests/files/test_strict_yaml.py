"""YAML that says one thing twice, grows without end or means other things than it says is refused, with its line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import yaml

from lit_lora.__main__ import main
from lit_lora.files import strict_yaml
from lit_lora.interchange.adapter_folder import trained_quantization

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
REFUSED = [
    ("data: {train: a}\nmodel: {}\ndata: {train: b}", "line 3: 'data' is there already, in line 1"),
    ("data:\n  train: a\n  train: b", "line 3: 'train' is there already, in line 2"),
    ("{data: {train: a, train: b}}", "line 1: 'train' is there already"),
    (BOMB, "more than 20,000 values with each *alias written out"),
    ("data: &a [*a]", "line 1: *a stands inside of what it names"),
    ("data: " + "[" * 2000, "nested more than 50 deep"),
    ("- " * 5000, "nested more than 50 deep"),
    ("x: " + "y" * 300_000, "characters, expected at most 262,144"),
    ("data: !!python/object/apply:os.system [ls]", "line 1: the tag !!python/object/apply:os.system is refused"),
    ("data: !!binary aGk=", "line 1: the tag !!binary is refused"),
    ("data:\n\ttrain: a", "line 2: a tab cannot indent: use spaces"),
    ("? [1, 2]\n: 3", "line 1: expected a name before the colon"),
    ("seed_everything: " + "9" * 5000, "an integer of 5000 digits"),
    ("data: {train: a}\n---\ndata: {train: b}", "found another document"),
    ("data: {train: *nothing}", "undefined alias"),
    (b"data: {train: \xff}", "line 1: not UTF-8 (byte 0xff): save it as UTF-8"),
    ("data: {train: a}".encode("utf-16"), "not UTF-8"),
    (b"\x00\x01", "not valid YAML"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    Path("my.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "Traceback" not in error
    return error


def write(path: str, content: str | bytes) -> None:
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(("content", "told"), REFUSED, ids=[told[:30] for _, told in REFUSED])
def test_a_config_that_is_refused_is_told_with_its_line(folder, capsys, content, told):
    write("config.yaml", content)
    error = refused(
        capsys, "fit", "--data.train", "my.jsonl", "--config", "config.yaml", "--model.base=random:llama-2-7b"
    )
    assert "config.yaml" in error
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("content", "told"), REFUSED[::3], ids=[told[:30] for _, told in REFUSED[::3]])
def test_the_config_of_a_run_is_read_as_strictly(folder, content, told):
    Path("run/adapter").mkdir(parents=True)
    write("run/config.yaml", content)
    with pytest.raises(ValueError, match=r"run/config.yaml should be the config of the run") as caught:
        trained_quantization("run/adapter")
    assert told in str(caught.value)


@pytest.mark.parametrize("option", ["--model.lora", "--data.columns", "--trainer.callbacks", "--config", "--data"])
def test_values_on_the_command_line_are_read_as_strictly(folder, capsys, option):
    error = refused(capsys, "fit", "--data.train=my.jsonl", "--model.base=random:llama-2-7b", option, "{r: 1, r: 2}")
    assert "line 1: 'r' is there already, in line 1" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("option", ["--model.lora", "--data", "--trainer"])
def test_files_of_a_group_are_read_as_strictly(folder, capsys, option):
    Path("group.yaml").write_text("r: 1\nr: 2\n")
    error = refused(capsys, "fit", "--data.train=my.jsonl", "--model.base=random:llama-2-7b", option, "group.yaml")
    assert "group.yaml is not valid YAML: line 2: 'r' is there already, in line 1" in error


MEANINGS = [
    ("no", "no"), ("on", "on"), ("yes", "yes"), ("true", True), ("False", False), ("null", None), ("~", None), 
    ("", None),    ("2e-4", 2e-4), ("1e5", 1e5), ("+1.5e3", 1500.0), (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf),
    ("010", 10), ("0o17", 15), ("0x1f", 31), ("1_000", "1_000"), ("1:30", "1:30"), ("2026-11-25", "2026-11-25"),
    ("'1'", "1"), ("!!str 1", "1"), ("=", "="),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), MEANINGS)
def test_a_value_means_what_it_says(text, value):
    got = strict_yaml.parse(f"a: {text}")["a"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    "value", [value for _, value in MEANINGS] + ["2e-4", "010", "null", "0o7", "<<", "é", "a: b", ""]
)
def test_what_is_written_reads_back_the_same_here_and_in_yaml_1_1(value):
    text = strict_yaml.dump({"a": value})
    for got in (strict_yaml.parse(text)["a"], yaml.safe_load(text)["a"]):
        assert (got, type(got)) == (value, type(value))


def test_aliases_and_merges_within_limits_are_read():
    text = "x: &a {r: 1, s: 2}\ny: {z: &b {<<: *a, r: 3}}\nc: {<<: *b, q: *a}\n"
    assert strict_yaml.parse(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("packing: no", "packing: false"),
        ("packing: yes", "packing: true"),
        ("packing: false", "packing: false"),
        ("train: no", "train: 'no'"),
        ("columns: {prompt: on, completion: off}", "prompt: 'on'"),
        ("seed: 010", "seed: 10"),
        ("max_length: null", None),
        ("max_length:", None),
        ("packing: off", "packing: false"),
    ],
)
def test_settings_take_values_by_their_type(folder, capsys, given, shown):
    Path("no").write_text("x")
    arguments = ["fit", "--model.base=random:llama-2-7b", "--config", "{data: {train: my.jsonl}}", "--config", "c.yaml"]
    Path("c.yaml").write_text(f"data:\n  {given}\n")
    if shown is None:
        assert f"data.{given.partition(':')[0]}: expected " in refused(capsys, *arguments)
        return
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    assert shown in capsys.readouterr().out
