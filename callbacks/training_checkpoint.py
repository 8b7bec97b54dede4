"""Checkpoints by steps and by minutes, the last and the best kept; a failed write or a signal loses nothing.

Unlike Lightning's ModelCheckpoint: a write that fails (full disk, permission lost) is reported and tried again at the
next save, and only the end of the run makes it an error; Ctrl-C stops after the running batch, saves, and says how to
go on; a save during an exception never stores the gradients of a batch that was cut off.

Logs nothing. Works with any LightningModule. Files are ``<dirpath>/step=00000100.ckpt``.
"""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT

PARTIAL_GLOB = ".*.partial"


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
        if every_n_steps < 0 or keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"expected every_n_steps >= 0, keep_last >= 1, keep_best >= 0; got {every_n_steps}, {keep_last}, {keep_best}"
            )
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(f"every_n_minutes must be above 0 or None, got {every_n_minutes}")
        self.dirpath = dirpath
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep_last = keep_last
        self.monitor = monitor
        self.mode = mode
        self.keep_best = keep_best
        self.last_path: Path | None = None
        self.last_error: OSError | None = None
        self._scores: dict[str, float] = {}
        self._last_step = 0
        self._saved_at_s = 0.0
        self._batch_running = False
        self._interrupted = False
        self._previous_handler: Any = None

    @property
    def state_key(self) -> str:
        """Unique by what is kept."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode, every_n_steps=self.every_n_steps)

    @property
    def best_path(self) -> Path | None:
        """The best checkpoint that is kept, if there is a score."""
        ranked = self._ranked()
        return Path(ranked[0]) if ranked else None

    # ------------------------------------------------------------------ when to save

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the folder; remove what a killed process left half-written."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        self.dirpath = str(trainer.strategy.broadcast(str(folder)))
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(PARTIAL_GLOB):
                leftover.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and let Ctrl-C wait for the end of the running batch."""
        self._last_step = trainer.global_step
        self._saved_at_s = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that a batch is under way."""
        self._batch_running = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, and stop if Ctrl-C was pressed."""
        self._batch_running = False
        if trainer.global_step > self._last_step and self._is_due(trainer):
            self._save(trainer)
        if self._interrupted:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if the monitored metric is among the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None or not self.keep_best:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            return
        better = [s for s in self._scores.values() if (s <= score if self.mode == "min" else s >= score)]
        if len(better) < self.keep_best:
            self._save(trainer, score=float(score))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last state; a checkpoint that could not be written is an error now.

        Raises:
            OSError: if nothing could be saved since the last failure.
        """
        self._restore_handler()
        if trainer.global_step > self._last_step or self.last_path is None or self.last_error is not None:
            self._save(trainer)
        if self.last_error is not None:
            raise OSError(
                f"the last state could not be saved: {self.last_error}. The last good checkpoint is {self.last_path}"
            ) from self.last_error

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what is whole, and say how to resume."""
        self._restore_handler()
        if trainer.state.fn != "fit" or trainer.fast_dev_run or self.dirpath is None:  # type: ignore[attr-defined]
            return
        # Saving asks all ranks; only a termination that Lightning has spread reaches all of them at the same place.
        alone = trainer.world_size == 1
        if (alone or isinstance(exception, SIGTERMException)) and trainer.global_step > self._last_step:
            try:
                self._save(trainer)
            except RuntimeError as error:  # the state is not whole: the batch was cut off inside an accumulation window
                rank_zero_warn(f"Not saved: {error}")
        if self.last_path is not None:
            rank_zero_info(f"Stopped at step {trainer.global_step}. Resume with --ckpt_path {self.last_path}")

    def _is_due(self, trainer: L.Trainer) -> bool:
        by_steps = bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0
        by_time = False
        if self.every_n_minutes is not None:
            by_time = time.monotonic() - self._saved_at_s >= timedelta(minutes=self.every_n_minutes).total_seconds()
            if trainer.world_size > 1:
                by_time = trainer.strategy.broadcast(by_time)
        return by_steps or by_time

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted or not self._batch_running:
            raise KeyboardInterrupt
        self._interrupted = True
        rank_zero_info("Stopping after this batch. Press Ctrl-C again to stop at once.")

    def _restore_handler(self) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None

    # ------------------------------------------------------------------ saving and forgetting

    def _save(self, trainer: L.Trainer, score: float | None = None) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert self.dirpath is not None, "setup has not run"
        path = Path(self.dirpath) / f"step={trainer.global_step:08d}.ckpt"
        previous = (self.last_path, dict(self._scores))
        self.last_path = path
        if score is not None:
            self._scores[str(path)] = score
            for forgotten in self._ranked()[self.keep_best :]:
                del self._scores[forgotten]
        self._saved_at_s = time.monotonic()
        try:
            trainer.save_checkpoint(path)
        except OSError as error:  # raised on rank 0 only, before the barrier in which the others wait
            trainer.strategy.barrier("Trainer.save_checkpoint")
            self.last_path, self._scores = previous
            self.last_error = error
            rank_zero_warn(f"Checkpoint not saved at step {trainer.global_step}: {error}. Training goes on.")
            return
        self.last_error = None
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            self._forget(Path(self.dirpath))

    def _forget(self, folder: Path) -> None:
        files = sorted(folder.glob("step=*.ckpt"))
        kept = {str(path) for path in files[-self.keep_last :]} | set(self._scores)
        for path in files:
            if str(path) not in kept:
                path.unlink(missing_ok=True)

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
