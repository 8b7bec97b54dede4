"""Checkpoints by steps and by minutes, the last and the best kept; a failed write or a signal loses nothing.

Unlike Lightning's ModelCheckpoint: a write that fails (full disk, permission lost) is reported and tried again at the
next save, and only the end of the run makes it an error; Ctrl-C and SIGTERM stop after the running batch, save, and say
how to go on; nothing is ever saved of a batch that was cut off.

Logs nothing. Works with any LightningModule. Files are ``<dirpath>/step=00000100.ckpt``; use it with a ``CheckpointIO``
that writes files whole or not at all (``lit_lora.files.checkpoint.AtomicCheckpointIO``).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lit_lora.callbacks._support.stop_signals import StopSignals
from lit_lora.callbacks._support.trainer import any_rank, state_key
from lit_lora.files.atomic import make_folder, remove_partial_files
from lit_lora.files.checkpoint import SAVED

_OURS = "step=" + 8 * "[0-9]" + "*.ckpt"
"""Names of our files: another callback's ``step=3.ckpt`` beside them is not ours to delete."""


class TrainingCheckpoint(Checkpoint):
    """Save the state of training so that a run can go on where it stopped."""

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int = 100,
        every_n_minutes: float | None = 10.0,
        keep_last: int = 2,
        monitor: str | None = "val_loss",
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
    ) -> None:
        """Check the settings.

        Args:
            dirpath: folder for the files; ``checkpoints`` in the trainer's root folder if None.
            every_n_steps: optimizer steps between saves; 0 for none by steps.
            every_n_minutes: minutes between saves; None for none by time.
            keep_last: newest checkpoints to keep.
            monitor: logged metric that says which checkpoints are best; None to keep no best one.
            mode: whether a smaller or a larger ``monitor`` is better.
            keep_best: best checkpoints to keep.
        """
        super().__init__()
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps must be at least 0, got {every_n_steps}")
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        if keep_best < 0:
            raise ValueError(f"keep_best must be at least 0, got {keep_best}")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(f"every_n_minutes must be above 0 or None, got {every_n_minutes}")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep_last = keep_last
        self.monitor = monitor
        self.mode = mode
        self.keep_best = keep_best
        self.last_path: Path | None = None
        self.last_error: str | None = None
        """Why the newest state is not on disk; None if it is."""
        self._scores: dict[str, float] = {}
        self._counts: dict[Path, int] = {}
        """Of the files in the folder, how many had been saved by then; -1 for what is damaged."""
        self._count = 0
        self._last_step = 0
        self._saved_batches = 0
        self._saved_at_s = 0.0
        self._due = False
        self._signals = StopSignals()
        self._started = False

    @property
    def state_key(self) -> str:
        """Unique by what is kept."""
        return state_key(self, monitor=self.monitor, mode=self.mode)

    @property
    def best_path(self) -> Path | None:
        """The best checkpoint that is kept, if there is a score."""
        ranked = self._ranked()
        return Path(ranked[0]) if ranked else None

    # ------------------------------------------------------------------ when to save

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the folder; remove what a killed process left half-written; find out what is damaged.

        Raises:
            OSError: if the folder cannot be made or written to.
        """
        self._started = False
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        self.dirpath = str(trainer.strategy.broadcast(str(folder)))
        if trainer.is_global_zero:
            make_folder(folder, option="dirpath (of TrainingCheckpoint)")
            remove_partial_files(folder)
            self._counts = {path: _count(trainer, path) for path in folder.glob(_OURS)}
            self._count = max(0, *self._counts.values()) if self._counts else 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and let signals wait for the end of the running batch."""
        self._last_step = trainer.global_step
        self._saved_batches = _batches(trainer)
        self._saved_at_s = time.monotonic()
        self.last_error = None
        self._started = True
        self._signals.install()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to; save and stop if a signal came."""
        stepped = trainer.global_step > self._last_step
        if stepped:
            self._due = self._due or self._is_due(trainer)
            self._last_step = trainer.global_step
        if _validation_follows(trainer):  # a run that goes on from a checkpoint written here would leave it out
            return
        if self._due:
            self._save(trainer)
        if stepped or trainer.world_size == 1:  # several ranks agree once a step, at its end
            self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Stop if a signal came; several ranks stop after the validation instead."""
        if trainer.world_size == 1 and trainer.state.fn == "fit":
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it is time to, or if the monitored metric is among the best; stop if a signal came."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = self._score(trainer)
        if score is not None or self._due:
            self._save(trainer, score=score)
        self._stop_if_asked(trainer)

    def _score(self, trainer: pl.Trainer) -> float | None:
        """The monitored metric if it is among the best."""
        value = trainer.callback_metrics.get(self.monitor) if self.monitor is not None else None
        if value is None or not self.keep_best:
            return None
        score = float(trainer.strategy.broadcast(float(value)))  # may differ between ranks: the first decides
        better = [s for s in self._scores.values() if (s <= score if self.mode == "min" else s >= score)]
        return score if math.isfinite(score) and len(better) < self.keep_best else None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last state; a checkpoint that could not be written is an error now.

        Raises:
            OSError: if the last state is not on disk.
        """
        self._signals.restore()
        if _batches(trainer) > self._saved_batches or self.last_path is None:
            self._save(trainer)
        if self.last_error is not None:
            raise OSError(
                f"the last state could not be saved: {self.last_error}. The last good checkpoint is {self.last_path}"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save what is whole, and say how to resume; nothing of a run that was refused before it trained."""
        self._signals.restore()
        if trainer.state.fn != "fit" or trainer.fast_dev_run or not self._started:  # type: ignore[attr-defined]
            return
        # Saving takes all ranks, and an exception may be one rank's alone: what all of them stop for is saved before.
        if trainer.world_size == 1 and _batches(trainer) > self._saved_batches:
            if _is_whole(trainer):
                try:
                    self._save(trainer)
                except RuntimeError as error:
                    rank_zero_warn(f"Nothing saved after the exception: {error}")
            else:
                rank_zero_warn("Nothing saved after the exception: it cut off a batch, whose state is not whole")
        where = (
            f"Resume with --ckpt_path {self.last_path}" if self.last_path else "There is no checkpoint to resume from"
        )
        rank_zero_info(f"Stopped at step {trainer.global_step}. {where}")

    def _is_due(self, trainer: pl.Trainer) -> bool:
        by_steps = bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0
        by_time = False
        if self.every_n_minutes is not None:
            by_time = time.monotonic() - self._saved_at_s >= 60 * self.every_n_minutes
            if trainer.world_size > 1:
                by_time = trainer.strategy.broadcast(by_time)
        return by_steps or by_time

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        if not any_rank(trainer, self._signals.received is not None):
            return
        if _batches(trainer) > self._saved_batches:
            self._save(trainer)
        raise self._signals.exception()

    # ------------------------------------------------------------------ saving and forgetting

    def _save(self, trainer: pl.Trainer, score: float | None = None) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None, "setup has not run"
        path = Path(self.dirpath) / f"step={trainer.global_step:08d}.ckpt"
        previous = (self.last_path, dict(self._scores))
        self.last_path = path  # before the state of this callback goes into the file
        if score is not None:
            self._scores[str(path)] = score
            for forgotten in self._ranked()[self.keep_best :]:
                del self._scores[forgotten]
        self._saved_at_s = time.monotonic()
        self._due = False
        failure: str | None = None
        try:
            trainer.save_checkpoint(path)
        except OSError as error:  # on the first rank, before the barrier that the others wait in
            failure = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")
        self.last_error = trainer.strategy.broadcast(failure)
        if self.last_error is not None:
            self.last_path, self._scores = previous
            kept = f"the last good one is {self.last_path}" if self.last_path else "there is none yet"
            rank_zero_warn(
                f"Checkpoint of step {trainer.global_step} not saved: {self.last_error}. Training goes on and tries "
                f"again at the next save; {kept}."
            )
            return
        self._saved_batches = _batches(trainer)
        if trainer.is_global_zero:
            self._forget(path)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note when it was saved, in the file itself: a copy of it says the same."""
        checkpoint[SAVED] = {"at_s": time.time(), "count": self._count + 1}

    def _forget(self, written: Path) -> None:
        """Delete all but the newest and the best. As saved, not by step: a run may go on from an older checkpoint.

        What was damaged at the start goes first, so that it takes no undamaged one's place.
        """
        self._count += 1
        self._counts[written] = self._count
        files = sorted(written.parent.glob(_OURS), key=lambda path: (self._counts.get(path, 0), path.name))
        kept = {str(path) for path in files[-self.keep_last :]} | self._scores.keys()
        for path in files:
            if str(path) not in kept:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    rank_zero_warn(f"The old checkpoint {path} could not be deleted: {error}")

    def _ranked(self) -> list[str]:
        return sorted(self._scores, key=self._scores.__getitem__, reverse=self.mode == "max")

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """The last file and the scores of the kept ones."""
        return {"last_path": str(self.last_path) if self.last_path else None, "scores": dict(self._scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the files that are still there."""
        last_path = state_dict.get("last_path")
        self.last_path = Path(last_path) if last_path and Path(last_path).is_file() else None
        self._scores = {path: score for path, score in state_dict.get("scores", {}).items() if Path(path).is_file()}


def _count(trainer: pl.Trainer, path: Path) -> int:
    """How many checkpoints had been saved when this one was; 0 where it does not say, -1 if it cannot be read."""
    try:
        read: dict[str, Any] = trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu")
    except Exception as error:  # each CheckpointIO has its own for a damaged file
        rank_zero_warn(f"The checkpoint {path} does not count as one to keep: {error}")
        return -1
    saved = read.get(SAVED)
    count = saved.get("count") if isinstance(saved, dict) else None
    return count if isinstance(count, int) else 0


def _batches(trainer: pl.Trainer) -> int:
    """Batches trained on in the whole run, those inside of an unfinished accumulation window included."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def _is_whole(trainer: pl.Trainer) -> bool:
    """Whether no batch is under way."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.started == progress.processed


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning will validate between this batch and the next; it has no public way to ask."""
    fit_loop = trainer.fit_loop
    return fit_loop._data_fetcher is not None and fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher)
