"""A command line trains on the data it was told: what wins over what, from any folder, and nothing from outside."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import yaml

from lit_lora.__main__ import main
from lit_lora.cli.command_line import in_order
from lit_lora.files import environment
from lit_lora.files.shipped import shipped

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = ["--model.base", "random:tinyllama-1.1b", "--data.tokenizer", "bytes"]

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture
def resolved(tmp_path, monkeypatch, capfd):
    """The settings of a ``fit`` as ``--print_config`` shows them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    for name in ("my", "other", "val"):
        Path(f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "b"}) + "\n")
    Path("a.yaml").write_text(
        "data: {train: my.jsonl, batch_size: 3}\nmodel: {optimization: {learning_rate: 1.0e-5}}\n"
    )
    Path("b.yaml").write_text("data: {train: other.jsonl}\n")
    Path("data.yaml").write_text("train: other.jsonl\nbatch_size: 7\n")

    def run(*arguments: str) -> dict:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["fit", *ELSEWHERE, *arguments, "--print_config"])
        out, err = capfd.readouterr()
        assert caught.value.code in (0, None), err
        return yaml.safe_load(out) | {"said": err}

    return run


@pytest.mark.parametrize(
    ("arguments", "train"),
    [
        (["--data.train", "my.jsonl", "--config", "lora_standard.yaml"], "my.jsonl"),
        (["--config", "lora_standard.yaml", "--data.train", "my.jsonl"], "my.jsonl"),
        (["--data.train=my.jsonl", "--config=lora_standard.yaml"], "my.jsonl"),
        (["--data.train", "my.jsonl", "-c", "lora_standard.yaml"], "my.jsonl"),
        (["--data.train", "my.jsonl", "-clora_standard.yaml"], "my.jsonl"),
        (["--data.train", "my.jsonl", "--config", "configs/lora_standard.yaml"], "my.jsonl"),
        (["--data.train", "my.jsonl", "--config", "b.yaml"], "my.jsonl"),
        (["--data.train", "my.jsonl", "--config", "{data: {train: other.jsonl}}"], "my.jsonl"),
        (["--config", "b.yaml", "--data.train", "my.jsonl", "--config", "lora_standard.yaml"], "my.jsonl"),
        (["--config", "a.yaml", "--config", "b.yaml"], "other.jsonl"),
        (["--config", "b.yaml", "--config", "a.yaml"], "my.jsonl"),
        (["--data.train", "my.jsonl", "--data", "data.yaml"], "my.jsonl"),
        (["--data", "data.yaml", "--data.train", "my.jsonl"], "my.jsonl"),
        (["--data.train", "my.jsonl", "--data", "{train: other.jsonl}"], "my.jsonl"),
        (["--data.train", "other.jsonl", "--data.train", "my.jsonl"], "my.jsonl"),
    ],
    ids=" ".join,
)
def test_the_command_line_wins_over_config_files_wherever_they_stand(resolved, arguments, train):
    assert resolved(*arguments)["data"]["train"] == train


def test_what_the_command_line_leaves_open_comes_from_the_config_files(resolved):
    config = resolved("--model.lora.r", "4", "--config", "a.yaml", "--data", "data.yaml", "--data.train", "my.jsonl")
    assert config["data"]["batch_size"] == 7
    assert config["model"]["optimization"]["learning_rate"] == 1e-5
    assert "4" in str(config["model"]["lora"])


def test_a_config_from_a_pipe_is_read_once(resolved, tmp_path):
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    content = "data: {train: other.jsonl, batch_size: 5}\n"
    writer = threading.Thread(target=lambda: pipe.write_text(content), daemon=True)
    writer.start()
    config = resolved("--data.train", "my.jsonl", "--config", str(pipe))
    writer.join(timeout=10)
    assert (config["data"]["train"], config["data"]["batch_size"]) == ("my.jsonl", 5)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.train", "x", "--config", "a.yaml", "--model.lora.r", "3", "-c", "b.yaml"],
        [
            "--trainer.callbacks+=A",
            "--trainer.callbacks.x",
            "1",
            "--trainer.callbacks+=B",
            "--trainer.callbacks.y",
            "2",
        ],
        ["--data.train", "x", "--data", "d.yaml", "stray", "--print_config"],
        [],
    ],
)
def test_ordering_again_changes_nothing_and_loses_nothing(arguments):
    """Lightning starts the other ranks of a run with what came out, and they put it in order again."""
    once = in_order(arguments)
    assert in_order(once) == once
    words = " ".join(arguments).replace("-c ", "--config ").replace("--config ", "--config=").split()
    assert sorted(once) == sorted(words)


def test_options_of_one_class_keep_their_order():
    appended = ["--trainer.callbacks+=A", "--trainer.callbacks.x", "1", "--trainer.callbacks+=B"]
    assert in_order([*appended, "--config=a.yaml"]) == ["--config=a.yaml", *appended]


@pytest.mark.parametrize(
    ("arguments", "expected", "said"),
    [
        (
            ["--config", "lora_standard.yaml", "--data.validation", "val.jsonl"],
            {"data.validation": "val.jsonl", "data.validation_fraction": 0.0},
            "data.validation of the command line replaces data.validation_fraction 0.05 of lora_standard.yaml",
        ),
        (
            ["--config", "lora_standard.yaml", "--config", "{data: {validation: val.jsonl}}"],
            {"data.validation": "val.jsonl", "data.validation_fraction": 0.0},
            "replaces data.validation_fraction 0.05 of lora_standard.yaml",
        ),
        (
            ["--config", "{data: {validation_fraction: 0.1}}", "--data.validation", "val.jsonl"],
            {"data.validation": "val.jsonl", "data.validation_fraction": 0.0},
            "replaces data.validation_fraction 0.1",
        ),
        (
            ["--config", "lora_standard.yaml", "--trainer.max_epochs", "2"],
            {"trainer.max_epochs": 2, "trainer.max_steps": -1},
            "trainer.max_epochs of the command line replaces trainer.max_steps 100 of lora_standard.yaml",
        ),
        (
            ["--config", "{trainer: {max_steps: 50}}", "--trainer.max_epochs", "2", "--data.train", "my.jsonl"],
            {"trainer.max_epochs": 2, "trainer.max_steps": 50},
            "",
        ),
        (
            ["--config", "lora_standard.yaml", "--trainer.max_epochs", "2", "--trainer.max_steps", "9"],
            {"trainer.max_epochs": 2, "trainer.max_steps": 9},
            "",
        ),
        (["--config", "lora_standard.yaml"], {"data.validation_fraction": 0.05, "trainer.max_steps": 100}, ""),
    ],
)
def test_a_setting_replaces_what_a_config_set_in_its_way_and_says_so(resolved, arguments, expected, said):
    config = resolved(*arguments)
    for key, value in expected.items():
        group, _, name = key.partition(".")
        assert config[group][name] == value, key
    assert said in config["said"]
    assert ("replaces" in config["said"]) == bool(said)


def test_two_settings_of_the_command_line_that_exclude_each_other_are_refused(resolved, capfd):
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "fit",
                *ELSEWHERE,
                "--data.train=my.jsonl",
                "--data.validation=val.jsonl",
                "--data.validation_fraction=0.1",
            ]
        )
    assert caught.value.code == 2
    assert "validation_fraction has no effect beside a validation file" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", ["LIT_LORA_DATA__TRAIN", "LIT_LORA_FIT__DATA__TRAIN", "LIT_LORA_FIT__CONFIG", "LIT_LORA_CONFIG"]
)
def test_the_environment_sets_nothing_and_a_variable_without_effect_is_named(resolved, monkeypatch, name):
    monkeypatch.setenv(name, "b.yaml" if name.endswith("CONFIG") else "other.jsonl")
    config = resolved("--config", "a.yaml")
    assert config["data"]["train"] == "my.jsonl"
    assert f"the environment variable {name} has no effect" in config["said"]


def test_a_mistyped_variable_is_answered_and_known_ones_are_documented(monkeypatch, capsys):
    monkeypatch.setenv("LIT_LORA_CASHE", "/tmp")
    environment.warn_of_unknown_variables()
    assert "did you mean 'LIT_LORA_CACHE'?" in capsys.readouterr().err
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    assert [name for name in environment.VARIABLES if f"`{name}`" not in page] == []


def test_every_variable_of_the_code_is_known():
    files = [*(ROOT / "lit_lora").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]
    used = {name for path in files for name in re.findall(r"\bLIT_LORA_[A-Z_]+", path.read_text(encoding="utf-8"))}
    example = "LIT_LORA_FIT__DATA__TRAIN"
    assert used - {example, environment.PREFIX} == {*environment.VARIABLES, *environment._INTERNAL}


def test_help_names_the_options_without_the_environment(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "ENV:" not in capsys.readouterr().out


def test_a_verb_that_is_a_function_takes_its_parameters_by_place_or_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = []
    for arguments in (["nowhere", "out"], ["--adapter", "nowhere", "out"], ["--output=out", "nowhere"]):
        with pytest.raises(SystemExit):
            main(["merge", *arguments])
        said.append(capsys.readouterr().err)
    assert len(set(said)) == 1
    assert "no adapter in nowhere" in said[0]


def test_config_files_of_a_verb_that_is_a_function_give_way_to_its_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("adapter: from_config\n")
    with pytest.raises(SystemExit):
        main(["generate", "hi", "--adapter", "given", "--config", "a.yaml"])
    assert "no adapter in given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["evaluate", "configs/data/requests_test.jsonl", "runs/x"], ["evaluate", "data/requests_test.jsonl", "runs/x"]],
    ids=" ".join,
)
def test_shipped_data_is_found_by_every_verb_from_any_folder(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "no adapter folder 'runs/x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["../pyproject.toml", "../../lit_lora/config.py", "data/../../README.md", "/etc/passwd"]
)
def test_nothing_but_what_ships_is_found_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert shipped(name) is None
    assert shipped("quickstart.yaml") == shipped("configs/quickstart.yaml")
    Path("quickstart.yaml").touch()
    assert shipped("quickstart.yaml") is None
