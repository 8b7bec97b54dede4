"""A record that cannot be written for a while costs nothing but the record of that while."""

from __future__ import annotations

import csv
import errno
import json
import resource
import signal

import lightning as L
import pytest
import torch

from lit_lora import LoRAConfig, LoRALightningModule, SFTDataModule, TrainingMetrics
from lit_lora.callbacks import ConvergenceAssertion, TrainingCheckpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO
from lit_lora.files.csv_log import PatientCSVLogger
from lit_lora.runs.run_record import RunRecord
from tests.tiny import config

STEPS = 8


class At(L.Callback):
    """Does something before so many batches."""

    def __init__(self, actions):
        self.actions = actions

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.actions.get(trainer.global_step, lambda: None)()


@pytest.fixture
def fit(tmp_path):
    config("Llama", vocab_size=260).save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"say {i}", "completion": f"{i * i}"} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, *callbacks):
        L.seed_everything(0, verbose=False)
        folder = tmp_path / name
        record = RunRecord()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            max_epochs=-1,
            val_check_interval=1,
            log_every_n_steps=1,
            callbacks=[*callbacks, record, TrainingCheckpoint(every_n_steps=1)],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=folder,
            logger=PatientCSVLogger(folder, name="logs"),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = LoRALightningModule(f"random:{tmp_path / 'base'}", lora=LoRAConfig(r=4))
        data = SFTDataModule(
            str(tmp_path / "train.jsonl"),
            tokenizer="bytes",
            batch_size=2,
            validation_fraction=0.2,
            cache_dir=tmp_path / "cache",
        )
        trainer.fit(module, datamodule=data)
        record.conclude(trainer)
        return {name: p.detach().clone() for name, p in module.trainable_parameters().items()}

    return run


def folder_lost(folder):
    folder.rename(folder.with_name("kept"))
    folder.write_text("in the way")


def folder_back(folder):
    folder.unlink()
    folder.with_name("kept").rename(folder)


def record_of(folder):
    metrics = TrainingMetrics.load(folder / "metrics.jsonl")
    (log,) = folder.glob("logs/*/metrics.csv")
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    return metrics.losses, logged, [entry["val_loss"] for entry in metrics.validation], set(rows[0])


@pytest.mark.filterwarnings("ignore:Checkpoint of step")
@pytest.mark.parametrize("lost_at", [0, 3])
def test_a_record_that_fails_for_a_while_is_complete_in_the_end(fit, tmp_path, lost_at):
    expected = fit("whole")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".metrics.jsonl.x.partial").touch()
    actions = {lost_at: lambda: folder_lost(folder), STEPS - 2: lambda: folder_back(folder)}
    with pytest.warns(UserWarning, match="not written") as caught:
        weights = fit("run", At(actions))
    told = [str(warning.message) for warning in caught]
    assert sum("not written" in text and "tries again" in text for text in told) == 2, told  # once a kind
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert record_of(folder) == record_of(tmp_path / "whole")
    assert json.loads((folder / "verdict.json").read_text())["reasons"] == ["no check is configured"]
    assert not list(folder.rglob("*.partial"))


@pytest.fixture
def disk():
    """Call it with the bytes that a file may have, as on a full disk; None for as many as before."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("added", [{"a": 3.0}, {"b": 3.0}])
def test_a_full_disk_leaves_the_log_as_it_was_and_the_rows_come_later(tmp_path, disk, added):
    """Neither half a row of the old columns, nor a file emptied for its new header."""
    logger = PatientCSVLogger(tmp_path, name="logs")
    path = tmp_path / "logs" / "version_0" / "metrics.csv"
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    before = path.read_text()
    logger.log_metrics(added, step=1)
    disk(len(before) + 2)
    with pytest.warns(UserWarning, match=r"CSV log was not written: .*File too large"):
        logger.save()
    logger.save()  # told once
    assert path.read_text() == before
    assert logger.failure is not None
    disk(None)
    logger.log_metrics({"a": 4.0}, step=2)
    logger.save()
    assert logger.failure is None
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    expected = [{"a": 1.0, "step": 0}, {**added, "step": 1}, {"a": 4.0, "step": 2}]
    assert rows == [{key: str(value) for key, value in row.items()} for row in expected]


@pytest.mark.filterwarnings("ignore:Checkpoint of step")
@pytest.mark.filterwarnings("ignore:The ")
def test_a_record_that_cannot_be_written_in_the_end_is_an_error(fit, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lit_lora.files.append_log.atomic_write", fail)
    with pytest.raises(OSError, match=r"record of the run could not be written: .*No space left"):
        fit("run")
    assert (tmp_path / "run" / "verdict.json").is_file()
    assert list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:Checkpoint of step")
@pytest.mark.filterwarnings("ignore:The ")
def test_what_ended_the_run_is_not_masked_by_a_record_that_cannot_be_written(fit, tmp_path):
    def fail():
        folder_lost(tmp_path / "run")
        raise ArithmeticError("the real reason")

    with pytest.raises(ArithmeticError, match="the real reason"):
        fit("run", ConvergenceAssertion(), At({3: fail}))
