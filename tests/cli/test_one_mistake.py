"""One mistake is told as one: no invented problem beside it, from whatever folder, and no guess that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lit_lora.__main__ import TOOLS, main
from lit_lora.cli import lightning_cli as cli
from lit_lora.cli import synonyms
from lit_lora.cli.config_check import parser_of
from lit_lora.cli.setting_check import known_settings

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with data, and below it an empty one to work in."""
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    (tmp_path / "my.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path


def problems(capsys, *arguments: str) -> list[str]:
    """What a command line is refused for, a line each."""
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert "Traceback" not in error
    first, *rest = error.replace("lit-lora: error: ", "").strip().splitlines()
    return [line.strip() for line in rest] if first.endswith("problems:") else [first, *rest]


BASE = ["--model.base", "random:tinyllama-1.1b", "--data.tokenizer", "bytes"]
SHIPPED = ["fit", "--config", "lora_standard.yaml", *BASE]
OWN = ["fit", *BASE, "--data.train", "{folder}/my.jsonl"]
EARLY = "EarlyStopping"

MISTAKES = [
    ([*SHIPPED, "--trainer.max_stps", "3"], "no setting 'trainer.max_stps', did you mean 'trainer.max_steps'?"),
    ([*SHIPPED, "--trainer.max_steps", "many"], "trainer.max_steps: expected a whole number, got 'many'"),
    (
        [*SHIPPED, "--model.optimization.learning_rate", "-1"],
        "model.optimization.learning_rate: learning_rate must be above 0",
    ),
    ([*SHIPPED, "--model.lora.r", "0"], "model.lora.r: r must be at least 1, got 0"),
    ([*SHIPPED, "--model.lora.r", "x"], "model.lora.r: expected a whole number, got 'x'"),
    ([*SHIPPED, "--model.lora.rank", "4"], "no setting 'model.lora.rank': here it is 'model.lora.r'"),
    ([*SHIPPED, "--model.lora", "none.yaml"], "model.lora: expected settings by name, got 'none.yaml'"),
    ([*SHIPPED, "--model.quantization.bits", "5"], "model.quantization.bits: expected one of 4, 8, got 5"),
    ([*SHIPPED, "--model.dtype", "float8"], "model.dtype: expected one of auto, float32, bfloat16, float16, got"),
    ([*SHIPPED, "--data.train", "nowhere.jsonl"], "data.train: no data file at nowhere.jsonl"),
    ([*SHIPPED, "--data.validation", "nowhere.jsonl"], "data.validation: no data file at nowhere.jsonl"),
    ([*SHIPPED, "--data.validation_fraction", "2"], "validation_fraction must be in [0, 1), got 2"),
    ([*SHIPPED, "--data.columns", "prompt"], "data.columns: expected settings by name or null, got 'prompt'"),
    ([*SHIPPED, "--data.columns", "{a: x, a: y}"], "data.columns: line 1: 'a' is there already, in line 1"),
    ([*SHIPPED, "--trainer.precision", "16-true"], "trainer.precision: precision 16-true trains adapters in float16"),
    ([*SHIPPED, "--trainer.max-steps", "3"], "no setting 'trainer.max-steps', did you mean 'trainer.max_steps'?"),
    ([*SHIPPED, "--seed_everything", "-1"], "seed_everything: must be from 0 to"),
    ([*SHIPPED, "--lr", "1e-4"], "no setting 'lr': here it is 'model.optimization.learning_rate'"),
    (
        [*SHIPPED, "--data.trust_remote_code", "true"],
        "no setting 'data.trust_remote_code': here it is 'model.trust_remote_code' (for the base and the tokenizer)",
    ),
    ([*SHIPPED, "--conf", "x.yaml"], "no setting 'conf', did you mean 'config'?"),
    ([*SHIPPED, "--config", "lora_standad.yaml"], "no config file lora_standad.yaml: did you mean lora_standard.yaml?"),
    ([*SHIPPED, "more.jsonl"], "'more.jsonl' follows no --option: each takes one value"),
    ([*SHIPPED, "--trainer.max_steps"], "trainer.max_steps: expected a value after it"),
    ([*SHIPPED, "--convergence.window", "x"], "convergence.window: expected a whole number, got 'x'"),
    (OWN[:-2], "data.train is required"),
    ([*OWN, "--data.validation_fraction", "0.1", "--data.validation", "{folder}/my.jsonl"], "set one of them"),
    ([*OWN, f"--trainer.callbacks+={EARLY}"], "trainer.callbacks: EarlyStopping needs trainer.callbacks.monitor"),
    ([*OWN, "--trainer.callbacks+=EarlyStoping"], "no class 'EarlyStoping', did you mean 'EarlyStopping'?"),
    (
        [*OWN, f"--trainer.callbacks+={EARLY}", "--trainer.callbacks.monitr", "x"],
        "EarlyStopping has no argument 'monitr', did you mean 'monitor'?",
    ),
    (
        [*OWN, f"--trainer.callbacks+={EARLY}", "--trainer.callbacks.monitor=x", "--trainer.callbacks.patience=y"],
        "trainer.callbacks: patience: expected a whole number",
    ),
    (
        [*OWN, "--trainer.callbacks", f"[{{class_path: {EARLY}, init_args: {{monitr: x}}}}]"],
        "EarlyStopping has no argument 'monitr', did you mean 'monitor'?",
    ),
    ([*OWN, "--trainer.callbacks", "[{class_path: torch.optim.SGD}]"], "torch.optim.SGD is no Callback"),
    (
        [*OWN, "--config", f"{{trainer: {{callbacks+: {{class_path: {EARLY}, init_args: {{monitr: x}}}}}}}}"],
        "EarlyStopping has no argument 'monitr', did you mean 'monitor'?",
    ),
    (
        [*OWN, "--trainer.callbacks", "[{class_path: lightning.pytorch.callbacks.EarlyStopin}]"],
        "no class 'lightning.pytorch.callbacks.EarlyStopin' (module 'lightning.pytorch.callbacks' has no attribute",
    ),
    (
        [*OWN, "--trainer.callbacks", "[{class_path: nowhere.Mine}]"],
        "no class 'nowhere.Mine' (No module named 'nowhere')",
    ),
    ([*OWN, "--trainer.logger", "TensorBoardLoger"], "no class 'TensorBoardLoger', did you mean 'TensorBoardLogger'?"),
    ([*OWN, "--trainer.logger", "CSVLogger"], "trainer.logger: CSVLogger needs trainer.logger.save_dir"),
    (
        [*OWN, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dr", "x"],
        "CSVLogger has no argument 'save_dr', did you mean 'save_dir'?",
    ),
    ([*OWN, "--model.optimizer", "Adamm"], "model.optimizer: no class 'Adamm', did you mean 'Adam'?"),
    (
        [*OWN, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lrr=1"],
        "SGD has no argument 'lrr', did you mean 'lr'?",
    ),
    ([*OWN, "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=x"], "model.optimizer: lr: expected a number"),
    ([*OWN, "--model.lr_scheduler", "StepLR"], "model.lr_scheduler: StepLR needs model.lr_scheduler.step_size"),
    ([*OWN, "--model.optimizer.lr", "0.1"], "model.optimizer.lr is for a class: --model.optimizer CLASS comes first"),
    ([*OWN, "--trainer.logger.name", "x"], "trainer.logger.name is for a class: --trainer.logger CLASS comes first"),
    (
        [
            *OWN,
            "--model.optimizer.lr=2",
            "--config",
            "{model: {optimizer: {class_path: torch.optim.SGD}}}",
            "--lr",
            "3",
        ],
        "no setting 'lr'",
    ),
    ([*OWN[:2], "", *OWN[3:]], "model.base: expected a name or path, got ''"),
    ([*OWN, "--model.lora", "[]"], "model.lora: expected settings by name, got []"),
    ([*OWN, "--model.lora.r", "null"], "model.lora.r: expected a value, got null"),
    ([*OWN, "--config"], "--config: expected a file after it"),
    (["generate"], "missing: prompt"),
    (["generate", "two", "words"], "'words' follows no --option: each takes one value"),
    (["generate", "hi", "--adapt", "x"], "no setting 'adapt', did you mean 'adapter'?"),
    (["generate", "hi", "--max_new_tokens", "x"], "max_new_tokens: expected a whole number, got 'x'"),
    (["generate", "hi", "--quantization.bit", "4"], "no setting 'quantization.bit', did you mean 'quantization.bits'?"),
    (["evaluate", "my.jsonl", "runs/x", "--limits", "4"], "no setting 'limits', did you mean 'limit'?"),
    (["merge", "runs/x", "out", "--into", "bases"], "into: expected one of auto, base, dequantized, 4bit, got 'bases'"),
    (["export", "runs/x"], "missing: output"),
    (["estimate", *OWN[1:], "--data.batch_size", "x"], "data.batch_size: expected a whole number or null, got 'x'"),
    (["estimate", *SHIPPED[1:], "--model.lora.r", "0"], "model.lora.r: r must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_exactly_the_mistake_is_told(folder, capsys, arguments, told):
    found = problems(capsys, *(argument.replace("{folder}", str(folder)) for argument in arguments))
    assert len(found) == 1, found
    assert told in found[0]


@pytest.mark.parametrize("place", ["the checkout", "a folder with data"])
@pytest.mark.parametrize(
    ("arguments", "told"), MISTAKES[:12:2], ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_working_folder_invents_no_problem(folder, monkeypatch, capsys, place, arguments, told):
    monkeypatch.chdir(ROOT if place == "the checkout" else folder)
    test_exactly_the_mistake_is_told(folder, capsys, arguments, told)


@pytest.fixture(scope="module")
def settings_of_fit():
    """Keys of the real parser."""

    class Keys(Exception):
        pass

    class Cli(cli.LoRACLI):
        def parse_arguments(self, parser, args):
            raise Keys(known_settings(parser_of(parser, "fit")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit-lora", "fit"])
        with pytest.raises(Keys) as caught:
            cli._run(Cli)
    return caught.value.args[0]


@pytest.fixture(scope="module")
def settings_of_tools():
    """Parameters of the verbs that are functions, with the fields of a quantization."""
    import importlib
    import inspect

    names = {
        name
        for verb in TOOLS
        for name in inspect.signature(getattr(importlib.import_module(f"lit_lora.tools.{verb}"), verb)).parameters
    }
    return names | {"quantization.bits", "quantization.quant_type", "quantization.double_quant"} | {
        "quantization.compute_dtype", "quantization.skip_modules"
    }  # fmt: skip


def test_every_synonym_leads_to_a_setting_that_is_there(settings_of_fit, settings_of_tools):
    known = settings_of_fit | settings_of_tools
    assert len(synonyms.SYNONYMS) > 200
    wrong = {
        name: key
        for name, meaning in synonyms.SYNONYMS.items()
        if isinstance(meaning, dict)
        for key in meaning
        if key.removesuffix("+") not in known
    }
    assert wrong == {}


NAMES = {
    "lr": "model.optimization.learning_rate",
    "learning_rate": "model.optimization.learning_rate",
    "epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps",
    "output_dir": "trainer.default_root_dir",
    "report_to": "trainer.logger",
    "eval_steps": "trainer.val_check_interval",
    "save_steps": "checkpoint.every_n_steps",
    "save_total_limit": "checkpoint.keep_last",
    "logging_steps": "trainer.log_every_n_steps",
    "per_device_train_batch_size": "data.batch_size",
    "batch_size": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_checkpointing": "model.step.recompute",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "load_in_4bit": "model.quantization.bits",
    "load_in_8bit": "model.quantization.bits",
    "bnb_4bit_quant_type": "model.quantization.quant_type",
    "bnb_4bit_compute_dtype": "model.quantization.compute_dtype",
    "bnb_4bit_use_double_quant": "model.quantization.double_quant",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "rank": "model.lora.r",
    "alpha": "model.lora.lora_alpha",
    "lora_alpha": "model.lora.lora_alpha",
    "lora_dropout": "model.lora.lora_dropout",
    "target_modules": "model.lora.target_modules",
    "max_seq_length": "data.max_length",
    "max_length": "data.max_length",
    "max_grad_norm": "trainer.gradient_clip_val",
    "warmup_steps": "model.optimization.warmup_ratio",
    "warmup_ratio": "model.optimization.warmup_ratio",
    "lr_scheduler_type": "model.optimization.lr_schedule",
    "optim": "model.optimizer",
    "weight_decay": "model.optimization.weight_decay",
    "seed": "seed_everything",
    "resume_from_checkpoint": "ckpt_path",
    "adapter": "ckpt_path",
    "dataset_text_field": "data.columns",
    "model_name_or_path": "model.base",
    "devices": "trainer.devices",
    "use_dora": "model.lora.use_dora",
    "neftune_noise_alpha": None,
    "push_to_hub": None,
    "num_beams": None,
}


@pytest.mark.parametrize(("name", "key"), NAMES.items())
def test_a_name_of_another_trainer_leads_to_the_setting_or_to_the_reason(settings_of_fit, name, key):
    told = synonyms.suggestion(name, settings_of_fit)
    assert f"'{key}'" in told if key else told.startswith(": not supported: ")
    assert synonyms.suggestion(f"train.{name}", settings_of_fit) == told


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("model.rank", "'model.lora.r'"),
        ("model.lora.rank", "'model.lora.r'"),
        ("trainer.lr", "'model.optimization.learning_rate'"),
        ("trainer.epochs", "'trainer.max_epochs'"),
        ("packing", "'data.packing'"),
        ("window", "'convergence.window' or 'gradient_norm.window'"),
        ("trainr.max_steps", "'trainer.max_steps'"),
        ("max_stesp", "'trainer.max_steps'"),
        ("export.output", "; export has base_model_name, best_folder"),
        ("memory.model", "; memory has baseline, budget_mib"),
        ("convergence.lr", "; convergence has max_rise"),
        ("xyzzy", ""),
        ("model.xyzzy", "; model has "),
        ("data.xyzzy", "; data has "),
    ],
)
def test_a_guess_is_close_or_there_is_none(settings_of_fit, key, told):
    got = synonyms.suggestion(key, settings_of_fit)
    assert told in got
    assert bool(got) == bool(told)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "hi", "--model_name_or_path", "x"], "here it is 'base'"),
        (["generate", "hi", "--adapter_path", "x"], "here it is 'adapter'"),
        (["generate", "hi", "--load_in_4bit", "true"], "here it is 'quantization.bits' (4)"),
        (["generate", "hi", "--max_tokens", "3"], "here it is 'max_new_tokens'"),
        (["generate", "hi", "--lr", "3"], "'model.optimization.learning_rate' of lit-lora fit, not of generate"),
        (["generate", "hi", "--top_k", "3"], "not supported: sampling is by temperature and top_p"),
        (["evaluate", "a.jsonl", "x", "--max_samples", "3"], "here it is 'limit'"),
        (["merge", "x", "--output_dir", "y"], "here it is 'output'"),
        (
            ["estimate", "--lr", "3", *OWN[1:-2], "--config=lora_standard.yaml"],
            "here it is 'model.optimization.learning_rate'",
        ),
        (
            ["validate", "--lr", "3", *OWN[1:-2], "--config=lora_standard.yaml"],
            "here it is 'model.optimization.learning_rate'",
        ),
        (
            ["fit", "--config", "{lr: 3}", *OWN[1:-2], "--config=lora_standard.yaml"],
            "here it is 'model.optimization.learning_rate'",
        ),
        (["fit", "--config", "{lora: {r: 3}}", *OWN[1:-2], "--config=lora_standard.yaml"], "here it is 'model.lora'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_all_verbs_and_yaml_have_the_same_answers(capsys, monkeypatch, arguments, told):
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    found = problems(capsys, *arguments)
    assert told in found[0]
    assert len(found) == 1 or "missing" in found[1], found


def test_what_is_appended_reaches_the_run(tmp_path, monkeypatch, capsys):
    """As a plain LightningCLI takes it: a class appended by name, and its arguments after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    Path("my.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    appended = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    more = ["--trainer.callbacks+=LearningRateMonitor", "--config", "{trainer: {callbacks+: RichProgressBar}}"]
    with pytest.raises(SystemExit):
        main(["fit", *BASE, "--data.train", "my.jsonl", *appended, *more, "--print_config"])
    shown = capsys.readouterr().out
    kinds = [line.rpartition(".")[2] for line in shown.splitlines() if "callbacks." in line and "class_path" in line]
    assert kinds == ["RichProgressBar", "EarlyStopping", "LearningRateMonitor"]
    assert "monitor: val_loss" in shown
