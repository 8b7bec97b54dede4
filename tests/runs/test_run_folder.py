"""What a refused run leaves of itself: no config of its own, no taken folder, no advice to resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_lora import QuantizationConfig, TrainingMetrics
from lit_lora.__main__ import main
from lit_lora.interchange.adapter_folder import trained_quantization
from tests.tiny import config

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Run a fit of three steps with other settings, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    config("Llama", vocab_size=260).save_pretrained(tmp_path / "base")
    rows = [json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    options = {
        "--model.base": "random:base",
        "--data.train": "data.jsonl",
        "--data.tokenizer": "bytes",
        "--data.cache_dir": "cache",
        "--trainer.max_steps": 3,
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--trainer.default_root_dir": "run",
        "--convergence.min_decrease": 0.0,
    }

    def run(**changed: object) -> None:
        given = options | {f"--{name.replace('__', '.')}": value for name, value in changed.items()}
        main(["fit", *(str(part) for pair in given.items() for part in pair)])

    run.options = options
    return run


@pytest.mark.parametrize(
    "changed",
    [
        {"model__quantization__bits": 4, "model__quantization__block_size": 32},
        {"model__lora__r": 4},
        {"data__batch_size": 3},
    ],
)
def test_a_refused_resume_leaves_config_and_verdicts_of_the_run_and_no_advice(changed, fit, capfd):
    fit()
    kept = [Path("run") / name for name in ("config.yaml", "convergence.json", "metrics.jsonl", "verdict.json")]
    before = [path.read_bytes() for path in kept]
    capfd.readouterr()
    with pytest.raises(SystemExit):
        fit(ckpt_path="last", **changed)
    assert [path.read_bytes() for path in kept] == before
    assert not list(Path("run").glob("config.*.yaml"))
    assert "There is no checkpoint to resume from" not in "".join(capfd.readouterr())


def test_the_exported_adapter_says_how_its_base_was_quantized_after_a_refused_resume_too(fit):
    quantized = {"model__quantization__bits": 4, "model__quantization__block_size": 32}
    fit(**quantized)
    with pytest.raises(SystemExit):
        fit(ckpt_path="last")
    assert trained_quantization("run/adapter").quantization == QuantizationConfig(block_size=32)
    assert "block_size: 32" in Path("run/config.yaml").read_text()


def test_a_resume_that_is_accepted_keeps_the_earlier_config_beside_its_own(fit):
    fit()
    before = Path("run/config.yaml").read_text()
    fit(ckpt_path="last", trainer__max_steps=5)
    assert Path("run/config.1.yaml").read_text() == before
    assert "max_steps: 5" in Path("run/config.yaml").read_text()


def test_last_passes_over_a_damaged_checkpoint_and_says_so(fit, capfd):
    def losses() -> list[float]:
        return TrainingMetrics.load("run/metrics.jsonl").losses

    every_step = {"checkpoint__every_n_steps": 1, "trainer__max_steps": 4}
    fit(**every_step)
    whole = losses()
    *_, before, newest = sorted(Path("run/checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-200])
    with pytest.warns(UserWarning, match=newest.name):
        fit(**every_step, ckpt_path="last")
    assert f"Going on from {before}" in "".join(capfd.readouterr())
    assert losses() == whole


def test_refused_data_takes_no_folder(fit):
    Path("bad.jsonl").write_text('{"nothing": "known"}\n')
    for _ in range(2):
        with pytest.raises(SystemExit):
            fit(data__train="bad.jsonl")
    fit()
    assert [path.name for path in Path().glob("run*")] == ["run"]


def test_a_run_without_a_step_has_a_config_too(fit):
    fit(trainer__max_steps=0)
    assert "max_steps: 0" in Path("run/config.yaml").read_text()


@pytest.mark.ddp
def test_the_installed_script_starts_its_other_ranks_with_itself(fit):
    """As pip's console script: a file that calls ``main``, which Lightning starts again for the second rank."""
    script = Path("bin/lit-lora")
    script.parent.mkdir()
    script.write_text("from lit_lora.__main__ import main\nif __name__ == '__main__':\n    main()\n")
    arguments = {**fit.options, "--trainer.devices": 2, "--trainer.strategy": "ddp", "--trainer.max_steps": 2}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LIT_LORA_RUN")}
    process = subprocess.run(
        [sys.executable, script, "fit", *(str(part) for pair in arguments.items() for part in pair)],
        capture_output=True, text=True, env=environment, check=False, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert "lit_lora: proved" in process.stdout
    assert [path.name for path in Path().glob("run*")] == ["run"]
    read = torch.load(next(Path("run/checkpoints").glob("*.ckpt")), weights_only=True)
    assert len(read["lit_lora"]["ranks"]) == 2
