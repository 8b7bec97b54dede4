"""TrainingCheckpoint on modules that have never heard of lit_lora, and on one that has."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from plain_projects import PlainModel

import lit_lora.callbacks.training_checkpoint as training_checkpoint
from lit_lora.callbacks import TrainingCheckpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO, newest_checkpoint, read_checkpoint


class At(pl.Callback):
    """Does something after so many batches."""

    def __init__(self, batches, action):
        self.batches, self.action, self.count = batches, action, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count == self.batches:
            self.action()


class Failing(PlainModel):
    """Fails in the backward pass of one batch."""

    def __init__(self, fail_at):
        super().__init__()
        self.fail_at, self.count = fail_at, 0

    def on_after_backward(self):
        self.count += 1
        if self.count == self.fail_at:
            raise ArithmeticError("in the middle of a batch")


@pytest.fixture
def fit(make_trainer, tmp_path):
    def run(*callbacks, module=None, ckpt_path=None, **overrides):
        settings = {"enable_checkpointing": True, "max_epochs": -1, "plugins": [AtomicCheckpointIO()], **overrides}
        trainer = make_trainer(*callbacks, **settings)
        trainer.fit(module or PlainModel(), ckpt_path=ckpt_path)
        return trainer

    return run


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step=")) for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize(("keep_last", "expected"), [(1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8])])
def test_the_last_ones_are_kept(fit, tmp_path, keep_last, expected):
    callback = TrainingCheckpoint(every_n_steps=2, keep_last=keep_last)
    fit(callback)
    assert steps(tmp_path / "checkpoints") == expected
    assert callback.last_path == tmp_path / "checkpoints" / "step=00000008.ckpt"


def test_the_end_is_saved_and_not_twice(fit, tmp_path):
    callback = TrainingCheckpoint(every_n_steps=3, keep_last=9)
    trainer = fit(callback)
    assert steps(tmp_path / "checkpoints") == [3, 6, 8]
    written = (tmp_path / "checkpoints" / "step=00000008.ckpt").stat().st_mtime_ns
    callback.on_train_end(trainer, trainer.lightning_module)
    assert (tmp_path / "checkpoints" / "step=00000008.ckpt").stat().st_mtime_ns == written


def test_by_minutes(fit, tmp_path, monkeypatch):
    """A clock on which each look is 20 seconds later: a step looks once, a save twice."""
    clock = itertools.count(0, 20)
    monkeypatch.setattr(training_checkpoint.time, "monotonic", lambda: next(clock))
    fit(TrainingCheckpoint(every_n_steps=0, every_n_minutes=1, keep_last=9))
    assert steps(tmp_path / "checkpoints") == [3, 6, 8]


class Scored(PlainModel):
    scores = (5.0, 1.0, float("nan"), 3.0)

    def on_validation_epoch_end(self):
        self.log("score", self.scores[self.trainer.global_step // 2 - 1])


@pytest.mark.parametrize(
    ("mode", "keep_best", "expected"), [("min", 1, [4, 8]), ("max", 1, [2, 8]), ("min", 2, [4, 8])]
)
def test_the_best_are_kept_beside_the_last(fit, tmp_path, mode, keep_best, expected):
    callback = TrainingCheckpoint(every_n_steps=0, monitor="score", mode=mode, keep_best=keep_best, keep_last=1)
    fit(callback, module=Scored(), limit_val_batches=1, val_check_interval=2)
    assert steps(tmp_path / "checkpoints") == expected
    assert callback.best_path == tmp_path / "checkpoints" / f"step={expected[0]:08d}.ckpt"


def test_state_survives_a_resume(fit, tmp_path):
    options = {"module": Scored(), "limit_val_batches": 1, "val_check_interval": 2}
    settings = {"every_n_steps": 0, "monitor": "score", "keep_last": 1}
    fit(TrainingCheckpoint(**settings), max_steps=4, **options)
    resumed = TrainingCheckpoint(**settings)
    fit(resumed, ckpt_path=tmp_path / "checkpoints" / "step=00000004.ckpt", **options)
    assert resumed.best_path == tmp_path / "checkpoints" / "step=00000004.ckpt"
    assert steps(tmp_path / "checkpoints") == [4, 8]


def test_going_on_from_an_older_one_does_not_delete_what_it_writes(fit, tmp_path):
    fit(TrainingCheckpoint(every_n_steps=2, keep_last=9))
    older = tmp_path / "checkpoints" / "step=00000002.ckpt"
    fit(TrainingCheckpoint(every_n_steps=1, keep_last=1), ckpt_path=older, max_steps=3)
    assert steps(tmp_path / "checkpoints") == [3]


def test_a_damaged_one_takes_no_undamaged_ones_place(fit, tmp_path):
    folder = tmp_path / "checkpoints"
    fit(TrainingCheckpoint(every_n_steps=1, keep_last=3), max_steps=4)
    newest = folder / "step=00000004.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"step=00000004\.ckpt does not count as one to keep"):
        fit(TrainingCheckpoint(every_n_steps=5), ckpt_path=folder / "step=00000003.ckpt", max_steps=5)
    assert steps(folder) == [3, 5]


@pytest.mark.parametrize(("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SIGTERMException)])
def test_a_signal_saves_after_the_batch_and_stops(fit, tmp_path, signum, kind):
    handler = signal.getsignal(signum)
    callback = TrainingCheckpoint(every_n_steps=100)
    with pytest.raises(SystemExit) as caught:
        fit(callback, At(3, lambda: os.kill(os.getpid(), signum)))
    assert isinstance(caught.value, kind) or isinstance(caught.value.__context__, kind)
    assert steps(tmp_path / "checkpoints") == [3]
    signal.signal(signum, handler)  # Lightning ignores Ctrl-C for good
    trainer = fit(TrainingCheckpoint(), ckpt_path=callback.last_path)
    assert trainer.global_step == 8


def test_a_signal_within_validation_stops_there(fit, tmp_path):
    class Slow(PlainModel):
        validated = 0

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            Slow.validated += 1
            if Slow.validated == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SIGTERMException):
        fit(TrainingCheckpoint(every_n_steps=100), module=Slow(), limit_val_batches=8, val_check_interval=2)
    assert Slow.validated == 2
    assert steps(tmp_path / "checkpoints") == [2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_nothing_is_saved_of_a_batch_that_was_cut_off(fit, tmp_path, accumulate):
    with pytest.raises(ArithmeticError), pytest.warns(UserWarning, match="cut off a batch"):
        fit(TrainingCheckpoint(every_n_steps=4 // accumulate), module=Failing(6), accumulate_grad_batches=accumulate)
    last, _ = newest_checkpoint(tmp_path / "checkpoints")
    assert read_checkpoint(last)["global_step"] == 4 // accumulate
    progress = read_checkpoint(last)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert progress["processed"] == 4


def test_an_exception_between_batches_saves(fit, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit(Stop(), TrainingCheckpoint(every_n_steps=100))
    assert steps(tmp_path / "checkpoints") == [3]


def replace_by_file(folder: Path) -> None:
    shutil.move(folder, folder.with_name("kept"))
    folder.write_text("in the way")


def restore_folder(folder: Path) -> None:
    folder.unlink()
    shutil.move(folder.with_name("kept"), folder)


def test_a_failed_write_is_reported_and_tried_again(fit, tmp_path):
    """Permission lost from step 3 to step 6; a folder replaced by a file holds for root, too."""
    folder = tmp_path / "checkpoints"
    callback = TrainingCheckpoint(every_n_steps=2, keep_last=9)
    with pytest.warns(UserWarning, match=r"Checkpoint of step 4 not saved: .*step=00000002\.ckpt"):
        fit(At(3, lambda: replace_by_file(folder)), At(6, lambda: restore_folder(folder)), callback)
    assert steps(folder) == [2, 6, 8]
    assert callback.last_error is None


def test_a_write_that_fails_to_the_end_is_an_error_and_the_last_good_one_stays(fit, tmp_path):
    folder = tmp_path / "checkpoints"
    message = r"last state could not be saved: .*The last good checkpoint is .*step=00000002\.ckpt"
    with pytest.warns(UserWarning, match="not saved"), pytest.raises(OSError, match=message):
        fit(At(3, lambda: replace_by_file(folder)), TrainingCheckpoint(every_n_steps=2))
    assert steps(folder.with_name("kept")) == [2]
    read_checkpoint(folder.with_name("kept") / "step=00000002.ckpt")


def test_leftovers_of_a_killed_process_are_removed_at_the_start(fit, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".step=00000002.ckpt.abc.partial").write_bytes(b"half")
    fit(TrainingCheckpoint())
    assert [path.name for path in folder.iterdir()] == ["step=00000008.ckpt"]


def test_fast_dev_run_writes_nothing(fit, tmp_path):
    fit(TrainingCheckpoint(every_n_steps=1), fast_dev_run=2)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": -1}, "every_n_steps must be at least 0"),
        ({"keep_last": 0}, "keep_last must be at least 1"),
        ({"every_n_minutes": 0}, "above 0 or None"),
        ({"mode": "best"}, "'min' or 'max'"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingCheckpoint(**options)
