"""The command line, from verb to run folder, on a tiny model with random weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from lit_lora.__main__ import main
from lit_lora.files.checkpoint import newest_checkpoint
from lit_lora.metrics import TrainingMetrics
from tests.tiny import config

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run a verb in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])

    def run(*arguments):
        main([str(argument) for argument in arguments])

    return run


@pytest.fixture
def fit(tmp_path):
    """Arguments of a fit that takes a second."""
    base = tmp_path / "base"
    config("Llama", vocab_size=260).save_pretrained(base)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(12)))
    options = {
        "--model.base": f"random:{base}",
        "--data.train": data,
        "--data.tokenizer": "bytes",
        "--data.cache_dir": tmp_path / "cache",
        "--data.validation_fraction": 0.25,
        "--trainer.max_steps": 3,
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--trainer.default_root_dir": tmp_path / "runs" / "tiny",
        "--convergence.min_decrease": 0.0,
    }
    return [part for pair in options.items() for part in pair]


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from lit_lora.__main__ import main; main(['--help']); "
    code += "assert not {'torch', 'lightning', 'jsonargparse'} & sys.modules.keys()"
    started = time.monotonic()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fit" in process.stdout
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "did you mean 'fit'"),
        (["fit", "--config", "quickstrat.yaml"], "quickstart.yaml"),
        (["fit", "--data.train", "x.jsonl", "--model.lora.rr", "4"], "lora.r"),
        (["generate", "hello"], "--base"),
        (["evaluate", "missing.jsonl", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_gets_a_line_with_a_suggestion(command, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        command(*arguments)
    assert caught.value.code in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_fit_writes_a_run_folder_and_never_into_an_earlier_one(command, fit, tmp_path, capsys):
    command("fit", *fit)
    run = tmp_path / "runs" / "tiny"
    for name in ("config.yaml", "metrics.jsonl", "verdict.json"):
        assert (run / name).is_file(), name
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert "run folder" in capsys.readouterr().out
    before = (run / "metrics.jsonl").read_bytes()
    command("fit", *fit)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "runs" / "tiny-2" / "verdict.json").is_file()


def test_a_run_folder_that_cannot_be_written_to_is_named_with_its_option(command, fit, tmp_path, capsys):
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(SystemExit):
        command("fit", *fit)
    folder = tmp_path / "runs" / "tiny"
    assert f"folder {folder}: Not a directory; set trainer.default_root_dir to" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_resume_and_has_its_exit_code(fit, tmp_path, signum, code):
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    options = ["--trainer.max_steps", 10**6, "--checkpoint.every_n_steps", 1]
    command = [sys.executable, "-m", "lit_lora", "fit", *map(str, [*fit, *options])]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            while process.poll() is None and not list(checkpoints.glob("*.ckpt")):
                time.sleep(0.05)
            process.send_signal(signum)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == code, error[-2000:]
    assert "Traceback" not in error
    newest, problems = newest_checkpoint(checkpoints)
    assert problems == []
    assert f"Resume with --ckpt_path {newest}" in error


def test_the_written_config_reproduces_the_run(command, fit, tmp_path):
    command("fit", *fit)
    again = tmp_path / "runs" / "again"
    written = tmp_path / "runs" / "tiny" / "config.yaml"
    command("fit", "--config", written, "--trainer.default_root_dir", again)
    losses = [TrainingMetrics.load(folder / "metrics.jsonl").losses for folder in (tmp_path / "runs" / "tiny", again)]
    assert losses[0] == losses[1]


def test_a_run_without_a_step_proves_nothing(command, fit, capsys):
    command("fit", *fit, "--trainer.max_steps", 0)
    assert "NOT JUDGED: no step was taken" in capsys.readouterr().out


def test_validate_reports_the_loss(command, fit, capsys):
    arguments = [part for part in fit if part not in ("--convergence.min_decrease", 0.0, "--trainer.max_steps", 3)]
    command("validate", *arguments)
    assert "val_loss" in capsys.readouterr().out


def test_estimate_says_whether_it_fits(command, fit, capsys):
    command("estimate", *fit, "--fits", "12GB")
    assert "peak" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        command("estimate", *fit, "--fits", "100KB")
    assert caught.value.code == 1
