"""Mistakes on the command line and in config files: all in one report, each in a line, each with the way out."""

from __future__ import annotations

import json

import pytest

from lit_lora.__main__ import main


@pytest.fixture
def fit(tmp_path, capsys, monkeypatch):
    """Write a config, run ``fit``, and give back exit code and error output."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")

    def run(config, *arguments):
        (tmp_path / "config.yaml").write_text(config if isinstance(config, str) else json.dumps(config))
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--config", "config.yaml", *arguments])
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert not (tmp_path / "runs").exists()
        return caught.value.code, error

    return run


def test_every_mistake_is_in_one_report(fit):
    config = {
        "trainer": {"max_stps": 30, "max_epochs": "many"},
        "model": {"base": "./nowhere", "lora": {"r": "four"}, "learning_rate": "fast"},
        "data": {"train": "trian.jsonl", "batch_sise": 2},
        "chekpoint": {"every_n_steps": 10},
    }
    code, error = fit(config, "--model.warmup_ratio", "x", "--data.sead=3")
    assert code == 2
    lines = error.splitlines()
    assert "10 problems" in lines[0]
    expected = [
        ("config.yaml", "'trainer.max_stps', did you mean 'trainer.max_steps'?"),
        ("config.yaml", "trainer.max_epochs", "int", "'many'"),
        ("config.yaml", "model.base", "./nowhere"),
        ("config.yaml", "model.lora", "four"),
        ("config.yaml", "model.learning_rate", "float", "'fast'"),
        ("config.yaml", "data.train", "did you mean train.jsonl?"),
        ("config.yaml", "'data.batch_sise', did you mean 'data.batch_size'?"),
        ("config.yaml", "'chekpoint', did you mean 'checkpoint'?"),
        ("command line", "model.warmup_ratio", "'x'"),
        ("command line", "'data.sead', did you mean 'data.seed'?"),
    ]
    for line, parts in zip(lines[1:], expected, strict=True):
        assert all(part in line for part in parts), (line, parts)


@pytest.mark.parametrize(
    ("config", "arguments", "code", "message"),
    [
        ({"data": {"train": "train.jsonl", "epochs": 3}}, [], 2, "no setting 'data.epochs'"),
        ({"data": {"train": "train.jsonl"}}, ["--model.lerning_rate", "1"], 2, "did you mean 'model.learning_rate'?"),
        ({"trainer": {"max_steps": 1.5}, "data": {"train": "train.jsonl"}}, [], 2, "trainer.max_steps"),
        ({"data": {"train": "train.jsonl"}}, ["--model.base", "smollm2-135m-instrct"], 1, "did you mean"),
        (
            {"data": {"train": "trains.jsonl"}, "model": {"base": "random:tinyllama-1.1b"}},
            [],
            1,
            "did you mean train.jsonl",
        ),
        (
            {"data": {"train": "train.jsonl"}, "trainer": {"strategy": "fsdp"}, "model": {"base": "random:x"}},
            [],
            1,
            "Use 'ddp'",
        ),
        (
            {"data": {"train": "train.jsonl"}, "model": {"base": "random:tinyllama-1.1b", "lora": {"r": "x"}}},
            [],
            1,
            "model.lora.r: Expected a <class 'int'>, got 'x'",
        ),
        (
            {"data": {"train": "train.jsonl"}, "model": {"base": "random:tinyllama-1.1b", "lora": {"rank": 3}}},
            [],
            1,
            "no setting 'model.lora.rank'",
        ),
        ("trainer: [1", [], 2, "not valid YAML"),
        ("- 1", [], 2, "config.yaml"),
        ("data: 3", [], 2, "data"),
        ("\x00", [], 2, "config.yaml"),
        (
            {"data": {"train": "train.jsonl"}, "model": {"base": "random:x"}},
            ["--ckpt_path", "no.ckpt"],
            1,
            "no checkpoint no.ckpt",
        ),
    ],
)
def test_one_mistake_is_one_line(fit, config, arguments, code, message):
    got, error = fit(config, *arguments)
    assert got == code, error
    assert message in error
    assert (
        len(
            error.replace("(set LIT_LORA_TRACEBACK=1 to see where)", "")
            .replace("Seed set to 42", "")
            .split("\n\n")[0]
            .strip()
            .splitlines()
        )
        == 1
    ), error


def test_a_mistyped_config_name_is_answered(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quikstart.yaml"])
    assert "did you mean quickstart.yaml?" in capsys.readouterr().err
