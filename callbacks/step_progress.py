"""StepProgress: how far a run is, readable on a terminal, in a log file and in a pipe.

Lightning's bars count the micro-batches of an epoch, take more lines than one for the metrics beside them, and write
nothing that a log could be read by. Here one line counts optimizer steps. It is drawn by tqdm, as Lightning's is.

A loss lies on the device, and reading it waits for the device: that is done for what is shown only, a few times a
second on a terminal and once a line in a log.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ProgressBar, Timer
from torch.optim import Optimizer

from lit_lora.callbacks._support.batch_counts import Count, count
from lit_lora.callbacks._support.displays import Display, display
from lit_lora.callbacks._support.pace import Pace
from lit_lora.callbacks._support.progress_text import Progress, rate
from lit_lora.callbacks._support.step_loss import StepLoss

_now_s = time.monotonic


class StepProgress(ProgressBar):
    """Shows optimizer steps of how many, loss, learning rate, speed and time left, on stdout of the first process.

    On a terminal that is one line, never wider than the terminal: a narrow one does without learning rate, then speed,
    time left and loss. Elsewhere (a file, a pipe, ``TERM=dumb``) it is a line for the first step, the last one, and at
    the first step after ``line_every_s`` seconds. Validation, test and prediction show batches of how many; a
    validation leaves a line with its loss.

    Steps are those of ``trainer.max_steps``, or those of ``trainer.max_epochs`` by batches and accumulation; where
    neither tells, no total is shown. Speed is in tokens, as :class:`ThroughputLogger` counts them, or in samples: those
    of the first process times the number of processes. The time left follows the pace so far, validation included, and
    ends with ``trainer.max_time``.

    Logs nothing. One progress bar serves a Trainer: it takes the place of Lightning's.

    Args:
        line_every_s: seconds from one line to the next where there is no terminal.
        monitor: logged metric that holds the loss of a step; where the module logs none by this name, or for None, the
            loss that ``training_step`` returns, averaged over the accumulation window.
        validation_monitor: logged metric that a validation leaves a line of.
    """

    def __init__(
        self,
        line_every_s: float = 30.0,
        *,
        monitor: str | None = "train_loss",
        validation_monitor: str = "val_loss",
    ) -> None:
        super().__init__()
        if line_every_s < 0:
            raise ValueError(f"line_every_s must not be negative, got {line_every_s}")
        self.line_every_s = line_every_s
        self.monitor = monitor
        self.validation_monitor = validation_monitor
        self._enabled = True
        self._display: Display | None = None
        self._shown_at_s = -math.inf
        self._step_loss = StepLoss(monitor, keep=1)
        self._loss: float | None = None
        self._learning_rate: Any = None
        self._total: int | None = None
        self._counts: list[Count] = [0, 0]
        """Tokens and samples of this process since the last reading."""
        self._amounts = [0, 0]
        """The same until then."""
        self._pace = Pace()
        self._last_step = 0
        self._shown_step: Progress | None = None
        self._evaluation_pace = Pace()
        self._num_evaluated = 0

    def disable(self) -> None:
        """Show nothing from here on."""
        self._enabled = False

    def enable(self) -> None:
        """Show it again."""
        self._enabled = True

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._step_loss.start(trainer)
        self._loss, self._learning_rate, self._shown_step = None, None, None
        self._counts, self._amounts, self._pace = [0, 0], [0, 0], Pace()
        self._last_step = trainer.global_step
        self._shown_at_s = -math.inf

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The number of batches may be another one in each epoch."""
        self._total = total_steps(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the learning rate of this step; after it the schedule has gone on."""
        self._learning_rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; show a step where it is time to."""
        if not self._enabled:
            return
        tokens, _, samples = count(batch)
        self._counts = [self._counts[0] + tokens, self._counts[1] + samples]
        if not self._step_loss.update(trainer, outputs):
            return
        if not self._pace.has_started or trainer.global_step == self._total or self._is_due():
            self._show_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the last step, also of a run that something else than its number of steps has ended."""
        if self._enabled and trainer.global_step != self._last_step:
            self._show_step(trainer)
        self._close(leave=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the line, and the next one to the error."""
        self._close(leave=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Nothing is shown between runs."""
        self._close(leave=True)

    def _show_step(self, trainer: pl.Trainer) -> None:
        for _, loss in self._step_loss.drain():  # waits for the device; no time is taken before
            self._loss = loss
        self._amounts = [amount + int(new) for amount, new in zip(self._amounts, self._counts, strict=True)]
        self._counts = [0, 0]
        self._last_step = trainer.global_step
        tokens, samples = self._amounts
        self._pace.mark(_now_s(), self._last_step, tokens or samples)
        total = self._total if self._total is not None and self._total >= self._last_step else None
        self._shown_step = Progress(
            "step",
            self._last_step,
            total,
            self._loss,
            None if self._learning_rate is None else float(self._learning_rate),
            self._speed(trainer.world_size, "tokens" if tokens else "samples"),
            _first_end(self._pace.seconds_left(total), _seconds_of_timers(trainer)),
        )
        self._show(self._shown_step)

    def _speed(self, num_processes: int, unit: str) -> str | None:
        speed = self._pace.per_s()
        return rate(speed[1] * num_processes, unit) if speed is not None and speed[1] else None

    # ------------------------------------------------------------------ validation, test, prediction

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The validation before training is done."""
        self._close(leave=False)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of the steps."""
        self._pace.pause(_now_s())
        self._start_evaluation()
        if trainer.sanity_checking:
            self._shown_at_s = _now_s()  # a short one is not worth a line

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the batch where it is time to."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._evaluated(trainer, "validating", batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave a line with the loss, and go on with the steps."""
        self._pace.resume(_now_s())
        if trainer.state.fn == "validate":
            self._close(leave=False)
        elif self._enabled and (not trainer.sanity_checking or trainer.num_sanity_val_steps == math.inf):
            loss = trainer.callback_metrics.get(self.validation_monitor)
            if loss is not None:
                where = f"step {trainer.global_step}" if trainer.global_step else "before training"
                self._shown().note(f"{where}: {self.validation_monitor} {float(loss):.4g}")
            if self._shown_step is not None:
                self._shown().back_to(self._shown_step)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._start_evaluation()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the batch where it is time to."""
        self._evaluated(trainer, "testing", trainer.num_test_batches)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room for the results."""
        self._close(leave=False)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        self._start_evaluation()

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the batch where it is time to."""
        self._evaluated(trainer, "predicting", trainer.num_predict_batches)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room for the results."""
        self._close(leave=False)

    def _start_evaluation(self) -> None:
        self._num_evaluated = 0
        self._evaluation_pace = Pace()

    def _evaluated(self, trainer: pl.Trainer, doing: str, batches: int | float | Sequence[int | float]) -> None:
        """One batch more. Nothing is read from the device, which may be some batches behind."""
        if not self._enabled:
            return
        self._num_evaluated += 1
        number = sum(batches) if isinstance(batches, Sequence) else batches
        total = int(number) if math.isfinite(number) else None
        is_end = self._num_evaluated in (1, total) and trainer.state.fn != "fit"  # a fit's validations are many
        if is_end or self._is_due() or not self._evaluation_pace.has_started:
            self._evaluation_pace.mark(_now_s(), self._num_evaluated)
        if is_end or self._is_due():
            left = self._evaluation_pace.seconds_left(total)
            self._show(Progress(doing, self._num_evaluated, total, seconds_left=left))

    # ------------------------------------------------------------------ showing

    def _shown(self) -> Display:
        if self._display is None:
            self._display = display(self.line_every_s)
        return self._display

    def _is_due(self) -> bool:
        return _now_s() - self._shown_at_s >= self._shown().interval_s

    def _show(self, progress: Progress) -> None:
        self._shown().show(progress)
        self._shown_at_s = _now_s()

    def _close(self, *, leave: bool) -> None:
        if self._display is not None:
            self._display.close(leave=leave)
            self._display = None


def total_steps(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
    """Optimizer steps that a fit will have taken at its end, earlier parts included; None where nothing tells.

    ``trainer.estimated_stepping_batches`` takes the accumulation of the first epoch for that of all.
    """
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    # Without automatic optimization a batch is any number of steps.
    if pl_module.automatic_optimization and epochs is not None and epochs >= 0 and math.isfinite(batches):
        schedule = next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)  # type: ignore[attr-defined]
        if schedule is None:
            ends.append(epochs * math.ceil(batches / trainer.accumulate_grad_batches))
        else:
            ends.append(sum(math.ceil(batches / schedule.get_accumulate_grad_batches(e)) for e in range(epochs)))
    return min(ends, default=None)


def _seconds_of_timers(trainer: pl.Trainer) -> float | None:
    """What ``max_time`` leaves, which Lightning keeps in a callback."""
    times = [c.time_remaining() for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]
    return _first_end(*times)


def _first_end(*seconds: float | None) -> float | None:
    known = [value for value in seconds if value is not None]
    return max(min(known), 0.0) if known else None
