"""The metrics of a run over stops, kills, folders and Trainers: whole, or said not to be."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import lit_lora
from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, SFTDataModule, TrainingMetrics
from lit_lora.callbacks import ConvergenceAssertion, GradientNormLogger, TrainingCheckpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO, read_checkpoint
from lit_lora.report.outcome import Outcome

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 3}
ROOT = Path(lit_lora.__file__).parents[1]


def parts() -> tuple[LoRALightningModule, SFTDataModule]:
    """The same at each call; a constant rate, so that the number of steps changes nothing."""
    optimization = OptimizationConfig(learning_rate=0.02, lr_schedule="constant")
    module = LoRALightningModule("random:base", lora=LoRAConfig(r=4, lora_dropout=0.1), optimization=optimization)
    options: dict[str, Any] = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": "cache"}
    return module, SFTDataModule("data.jsonl", validation_fraction=0.2, **options)


def fit(folder: str, max_steps: int, *callbacks: L.Callback, save_every: int = 2, **options: Any) -> Outcome:
    checks = [ConvergenceAssertion(-9.0, 3), TrainingCheckpoint(every_n_steps=save_every, keep_last=99, keep_best=0)]
    outcome = lit_lora.fit(
        *parts(), folder, max_steps=max_steps, callbacks=[*checks, *callbacks], **{**QUIET, **options}
    )
    return outcome  # type: ignore[return-value]  # None in the other processes


class KillAt(L.Callback):
    """SIGKILL before a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: str, step: int, max_steps: int) -> None:
    """A run in a process of its own, killed before it takes a step more."""
    code = f"from tests.runs.test_resumed_record import KillAt, fit\nfit({folder!r}, {max_steps}, KillAt({step}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]


def record(folder: str) -> TrainingMetrics:
    metrics = TrainingMetrics.load(Path(folder, "metrics.jsonl"))
    return replace(metrics, steps=[replace(step, step_time_s=0.0) for step in metrics.steps])


def judged(folder: str) -> dict[str, Any]:
    """What a run says of itself, without paths, times and memory."""
    verdict = json.loads(Path(folder, "verdict.json").read_text())
    verdicts = [v for v in verdict["verdicts"] if v["name"] not in ("memory", "adapter export")]
    convergence = json.loads(Path(folder, "convergence.json").read_text())
    return {**{name: verdict[name] for name in ("result", "step", "losses", "base")}, "a": verdicts, "b": convergence}


def contents(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def checkpoint(folder: str, step: int) -> Path:
    return Path(folder, "checkpoints", f"step={step:08d}.ckpt")


def test_a_run_that_is_killed_and_resumed_has_the_metrics_and_the_verdict_of_one_that_was_not(project):
    fit("whole", 12)
    killed("run", 9, 12)  # the checkpoint is of step 8, the file has the validation after step 9
    assert record("run").steps[-1].step == 9
    assert fit("run", 12, resume="last").result == "proved"
    assert record("run") == record("whole")
    assert judged("run") == judged("whole")
    assert [path.name for path in Path("run").glob("metrics.*.jsonl")] == ["metrics.1.jsonl"]


@pytest.mark.filterwarnings("ignore:gradient explosion", "ignore:loss spike")
def test_a_checkpoint_is_no_larger_after_more_steps(project):
    fit("run", 90, GradientNormLogger(window=10), save_every=30, val_check_interval=1.0)
    sizes = [checkpoint("run", step).stat().st_size for step in (30, 90)]
    assert sizes[1] - sizes[0] < 600, sizes
    state = [read_checkpoint(checkpoint("run", step))["lit_lora"]["record"] for step in (30, 90)]
    assert [entry["unsaved"] for entry in state] == ["", ""]
    assert len(record("run").steps) == 90


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"loss": ', '"loss": 1', 1))


def of_another_run(path: Path) -> None:
    fit("other", 8)
    shutil.copy("other/metrics.jsonl", path)


@pytest.mark.parametrize("harm", [cut, edit, of_another_run])
def test_a_record_that_is_another_is_an_error_and_harms_nothing(project, harm):
    fit("run", 8)
    path = Path("run/metrics.jsonl")
    original = path.read_bytes()
    harm(path)
    before = contents("run")
    for max_steps in (8, 10):  # also where no step is left
        with pytest.raises(
            ValueError, match=r"run/metrics.jsonl .* bytes.* Restore the file, or move it out of"
        ) as caught:
            fit("run", max_steps, resume="last")
        assert "is not the one that the checkpoint was saved with" in str(caught.value)
    assert contents("run") == before
    path.write_bytes(original)
    assert fit("run", 10, resume="last").result == "proved"
    assert len(record("run").steps) == 10


@pytest.mark.filterwarnings("ignore:The record of the run, metrics.jsonl, is not in")
def test_without_its_record_a_run_goes_on_and_is_not_judged_until_it_is_back(project, capsys):
    whole = fit("whole", 12)
    fit("run", 8)
    away = Path("run/metrics.jsonl").rename("away.jsonl")
    before = judged("run")
    finished = fit("run", 8, resume="last")
    assert (finished.result, finished.reasons, finished.exit_code) == ("not judged", ["record"], 0)
    assert "record          not judged: metrics.jsonl holds 0 of 8 steps" in capsys.readouterr().out
    assert json.loads(Path("run/verdict.json").read_text())["result"] == "not judged"
    away.rename("run/metrics.jsonl")
    assert fit("run", 8, resume="last").result == "proved"
    assert judged("run") == before

    Path("run/metrics.jsonl").unlink()
    for resumed in (fit("run", 12, resume="last"), fit("run", 12, resume="last")):
        assert (resumed.result, resumed.reasons) == ("not judged", ["record"])
        assert resumed.verdicts[-1].detail.startswith("metrics.jsonl holds 4 of 12 steps")
        checks = [v for v in resumed.verdicts if v.name in ("convergence", "gradients", "gradient flow")]
        assert [*map(tuple, checks)] == [tuple(v) for v in whole.verdicts if v in checks]
    assert [step.step for step in record("run").steps] == [9, 10, 11, 12]


def test_another_folder_takes_the_record_over_and_leaves_the_first_alone(project):
    fit("whole", 12)
    fit("run", 8)
    shutil.move("run", "elsewhere")
    before = contents("elsewhere")
    assert fit("new", 12, resume=str(checkpoint("elsewhere", 8))).result == "proved"
    assert record("new").steps == record("whole").steps
    assert contents("elsewhere") == before


def test_each_checkpoint_of_a_run_that_went_back_can_be_resumed_from(project):
    fit("run", 8)
    first = record("run")
    fit("run", 6, resume=str(checkpoint("run", 2)))
    assert [step.step for step in record("run").steps] == [1, 2, 3, 4, 5, 6]
    assert fit("run", 10, resume=str(checkpoint("run", 8))).result == "proved"
    assert record("run").steps[:8] == first.steps


without_checks = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def trainer(max_steps: int, folder: str, **options: Any) -> L.Trainer:
    quiet = {**QUIET, "logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(max_steps=max_steps, default_root_dir=folder, plugins=[AtomicCheckpointIO()], **quiet, **options)


@without_checks
def test_a_trainer_of_ones_own_goes_on_from_a_run_and_a_run_from_it(project):
    fit("whole", 12)
    fit("run", 4)
    module, data = parts()
    own = trainer(8, "own")
    own.fit(module, data, ckpt_path=checkpoint("run", 4))
    assert [replace(step, step_time_s=0.0) for step in module.training_metrics.steps] == record("whole").steps[:8]
    assert not Path("own/metrics.jsonl").exists()
    own.save_checkpoint("own.ckpt")
    assert fit("back", 12, resume="own.ckpt").step == 12
    assert record("back").steps == record("whole").steps


def test_a_fit_by_another_trainer_does_not_write_into_the_record_of_a_run(project):
    module, data = parts()
    lit_lora.fit(module, data, "run", max_steps=4, callbacks=[ConvergenceAssertion(-9.0)], **QUIET)
    before = Path("run/metrics.jsonl").read_bytes()
    other = trainer(2, "own")
    other.fit(module, data)
    other.save_checkpoint("own.ckpt")
    assert Path("run/metrics.jsonl").read_bytes() == before


@without_checks
def test_what_does_not_train_needs_no_record(project):
    fit("run", 4)
    Path("run/metrics.jsonl").unlink()
    module, data = parts()
    (results,) = trainer(4, "own").validate(module, data, ckpt_path=checkpoint("run", 4), verbose=False)
    assert results["val_loss"] > 0
    loaded = LoRALightningModule.load_from_checkpoint(checkpoint("run", 4))
    assert loaded.training_metrics.steps == []


@pytest.mark.ddp
@pytest.mark.filterwarnings("ignore:saved by 2 processes and resumed by 1")
def test_processes_that_come_and_go_keep_one_record(project):
    fit("run", 2)
    one = record("run")
    code = "from tests.runs.test_resumed_record import fit\nfit('run', 4, resume='last', devices=2, strategy='ddp')\n"
    Path("train.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = record("run")
    assert two.steps[:2] == one.steps
    assert [step.step for step in two.steps] == [1, 2, 3, 4]
    assert fit("run", 6, resume="last").result == "proved"
    assert record("run").steps[:4] == two.steps
    assert [step.step for step in record("run").steps] == [1, 2, 3, 4, 5, 6]
