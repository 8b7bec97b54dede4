"""Mistakes on the command line and in config files: all in one report, each in a line, each with the way out."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch import Trainer

from lit_lora.__main__ import main
from lit_lora.training import trainer_settings
from lit_lora.training.trainer_settings import check_trainer


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
        "model": {"base": "./nowhere", "lora": {"r": "four"}, "optimization": {"learning_rate": "fast"}},
        "data": {"train": "trian.jsonl", "batch_sise": 2},
        "chekpoint": {"every_n_steps": 10},
    }
    code, error = fit(config, "--model.optimization.warmup_ratio", "x", "--data.sead=3")
    assert code == 2
    lines = error.splitlines()
    assert "10 problems" in lines[0]
    expected = [
        ("config.yaml", "'trainer.max_stps', did you mean 'trainer.max_steps'?"),
        ("config.yaml", "trainer.max_epochs", "a whole number", "'many'"),
        ("config.yaml", "model.base", "./nowhere"),
        ("config.yaml", "model.lora", "four"),
        ("config.yaml", "model.optimization.learning_rate", "a number", "'fast'"),
        ("config.yaml", "data.train", "did you mean train.jsonl?"),
        ("config.yaml", "'data.batch_sise', did you mean 'data.batch_size'?"),
        ("config.yaml", "'chekpoint', did you mean 'checkpoint'?"),
        ("command line", "model.optimization.warmup_ratio", "'x'"),
        ("command line", "'data.sead', did you mean 'data.seed'?"),
    ]
    for line, parts in zip(lines[1:], expected, strict=True):
        assert all(part in line for part in parts), (line, parts)


REFUSED = {
    "seed_everything": -1,
    "trainer": {
        "precision": "16-true",
        "accumulate_grad_batches": 0,
        "gradient_clip_val": -1.0,
        "check_val_every_n_epoch": 0,
        "log_every_n_steps": -1,
        "accelerator": "cpu",
        "devices": 0,
        "max_steps": -5,
        "max_time": "long",
        "strategy": "fsdp",
    },
    "model": {
        "base": "random:tinyllama-1.1b",
        "lora": {"r": 0, "lora_dropout": 1.5, "lora_alpha": 0},
        "quantization": {"block_size": 48},
        "optimization": {"learning_rate": -1.0, "warmup_ratio": 2.0},
        "step": {"recompute": "much"},
    },
    "data": {"train": "train.jsonl", "max_length": 1, "batch_size": 0, "num_workers": -1},
    "memory": {"on_exceeded": "stop"},
    "checkpoint": {"keep_last": 0, "every_n_steps": -1},
}
REFUSALS = [
    "seed_everything: must be from 0 to",
    "model.lora.r: r must be at least 1, got 0",
    "model.lora.lora_dropout: lora_dropout must be in [0, 1), got 1.5",
    "model.lora.lora_alpha: lora_alpha must be above 0 to train, got 0",
    "model.quantization.block_size: block_size must be a power of two",
    "model.optimization.learning_rate: learning_rate must be above 0",
    "model.optimization.warmup_ratio: warmup_ratio must be in [0, 1), got 2.0",
    "model.step.recompute: expected an amount of memory",
    "trainer.strategy: 'fsdp' divides adapters too",
    "trainer.precision: precision 16-true trains adapters in float16",
    "trainer.accumulate_grad_batches: accumulate_grad_batches must be at least 1",
    "trainer.gradient_clip_val: gradient_clip_val must be at least 0",
    "trainer.check_val_every_n_epoch: check_val_every_n_epoch must be at least 1",
    "trainer.log_every_n_steps: log_every_n_steps must not be negative",
    "trainer.devices: `Trainer(devices=0)` value is not a valid input",
    "trainer.max_steps: `max_steps` must be a non-negative integer or -1",
    "trainer.max_time: `Timer(duration='long')` is not a valid duration",
    "data.num_workers: num_workers must not be negative, got -1",
    "data.max_length: max_length must be at least 2 tokens, got 1",
    "data.batch_size: batch_size must be at least 1, got 0",
    "memory.on_exceeded: on_exceeded stop has no effect without budget_mib",
    "checkpoint.every_n_steps: every_n_steps must be at least 0, got -1",
    "checkpoint.keep_last: keep_last must be at least 1, got 0",
]


def test_every_value_that_a_class_refuses_is_in_one_report(fit):
    code, error = fit(REFUSED)
    assert code == 2
    start, *lines = error.partition("lit-lora: error: ")[2].splitlines()
    assert start == f"{len(REFUSALS)} problems:"
    for line, expected in zip(lines, REFUSALS, strict=True):
        assert line.startswith(f"  {expected}"), (line, expected)


def test_few_trainers_are_built_to_find_what_is_wrong_with_theirs(fit, monkeypatch):
    built = []

    def counted(**arguments):
        built.append(arguments)
        return Trainer(**arguments)

    monkeypatch.setattr(trainer_settings, "Trainer", counted)
    fit(REFUSED)
    assert 0 < len(built) <= 2 * len(REFUSED["trainer"])


def test_refused_values_are_in_the_report_of_the_parsers_mistakes_too(fit):
    code, error = fit({**REFUSED, "trainr": {"max_stps": 3}}, "--gradient_norm.window", "1")
    assert code == 2
    assert f"{len(REFUSALS) + 2} problems" in error
    for expected in [*REFUSALS, "did you mean 'trainer'?", "gradient_norm.window: window must be at least"]:
        assert expected in error


def test_fields_of_nested_settings_on_the_command_line_are_in_the_report(fit):
    wrong = ["--model.lora.r", "0", "--model.lora.lora_dropout", "2", "--model.quantization.bit", "4"]
    code, error = fit({"data": {"train": "train.jsonl"}}, *wrong, "--trainer.max_steps", "x", "--data.batch_sz", "3")
    assert code == 2
    assert "5 problems" in error
    for expected in ["model.lora.r:", "model.lora.lora_dropout:", "model.quantization.bit", "max_steps", "batch_sz"]:
        assert expected in error


@pytest.mark.parametrize(
    ("config", "arguments", "code", "message"),
    [
        (
            {"data": {"train": "train.jsonl", "epochs": 3}},
            [],
            2,
            "no setting 'data.epochs': here it is 'trainer.max_epochs'",
        ),
        (
            {"data": {"train": "train.jsonl"}},
            ["--model.lerning_rate", "1"],
            2,
            "did you mean 'model.optimization.learning_rate'?",
        ),
        ({"trainer": {"max_steps": 1.5}, "data": {"train": "train.jsonl"}}, [], 2, "trainer.max_steps"),
        ({"data": {"train": "train.jsonl"}}, ["--model.base", "smollm2-135m-instrct"], 2, "did you mean"),
        (
            {"data": {"train": "train.jsonl"}, "model": {"base": "random:tinylama-1.1b"}},
            [],
            2,
            "model.base: no architecture 'tinylama-1.1b': did you mean 'tinyllama-1.1b'?",
        ),
        (
            {"data": {"train": "train.jsonl", "tokenizer": "byte"}, "model": {"base": "random:tinyllama-1.1b"}},
            [],
            2,
            "data.tokenizer: no model folder 'byte'",
        ),
        (
            {"data": {"train": "trains.jsonl"}, "model": {"base": "random:tinyllama-1.1b"}},
            [],
            2,
            "did you mean train.jsonl",
        ),
        (
            {
                "data": {"train": "train.jsonl"},
                "trainer": {"strategy": "fsdp"},
                "model": {"base": "random:tinyllama-1.1b"},
            },
            [],
            2,
            "lora_sharded",
        ),
        (
            {"data": {"train": "train.jsonl"}, "model": {"base": "random:tinyllama-1.1b", "lora": {"r": "x"}}},
            [],
            2,
            "model.lora.r: expected a whole number, got 'x'",
        ),
        (
            {"data": {"train": "train.jsonl"}, "model": {"base": "random:tinyllama-1.1b", "lora": {"rank": 3}}},
            [],
            2,
            "no setting 'model.lora.rank': here it is 'model.lora.r'",
        ),
        ("trainer: [1", [], 2, "not valid YAML"),
        ("- 1", [], 2, "config.yaml"),
        ("data: 3", [], 2, "data: expected settings by name, got 3"),
        ({"data": {"train": "train.jsonl"}, "trainer": [1]}, [], 2, "trainer: expected settings by name, got [1]"),
        ({"data": {"train": "train.jsonl", "x": {}}}, ["--model.base=random:llama-2-7b"], 2, "no setting 'data.x'"),
        ("\x00", [], 2, "config.yaml"),
        (
            {
                "data": {"train": "train.jsonl"},
                "model": {"base": "random:tinyllama-1.1b"},
                "trainer": {"max_steps": 1},
            },
            ["--ckpt_path", "no.ckpt"],
            1,
            "no checkpoint no.ckpt",
        ),
        (
            {
                "data": {"train": "train.jsonl"},
                "model": {"base": "random:tinyllama-1.1b"},
                "trainer": {"max_steps": 1},
            },
            ["--ckpt_path", "train.jsonl"],
            1,
            "checkpoint train.jsonl cannot be read: Weights only load failed",
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


@pytest.mark.parametrize(("precision", "dtype"), [("16-true", "float16"), ("bf16-true", "bfloat16")])
def test_adapters_are_not_made_half_precision_behind_adapter_dtype(precision, dtype):
    with pytest.raises(
        ValueError, match=rf"adapters in {dtype}, whatever model.lora.adapter_dtype .* model.dtype {dtype}"
    ):
        check_trainer(precision=precision)
