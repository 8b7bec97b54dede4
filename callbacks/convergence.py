"""ConvergenceAssertion: did the loss fall, and did it stay down.

Compares the mean loss of the first and of the last ``window`` optimizer steps, as
:func:`lit_lora.metrics.assert_loss_convergence` does. Only the two ends of the record are kept, so that memory does not
grow with the run. Losses are read from the device on logging steps.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.callbacks._support.step_loss import StepLoss
from lit_lora.callbacks._support.trainer import is_reading_step, state_key, write_json, writes_files
from lit_lora.callbacks.verdict import Check, NotProvedError, Verdict
from lit_lora.metrics import window_means

_MAX_NAMED = 5


class ConvergenceError(NotProvedError):
    """The loss did not fall as far as asked, or rose again."""


class ConvergenceAssertion(Check):
    """Asserts at the end of fit that the training loss fell, and writes the verdict to a file.

    The file ``<default_root_dir>/convergence.json`` holds ``passed``, ``detail`` and the numbers behind them. Runs with
    fewer than two windows are judged on half of their steps at each end; a run of fewer than two steps is not judged.
    Steps without a target (where the module logs ``train_targets``) do not count. A loss that is not finite fails the
    run. With several processes the means over all of them are judged. A resumed run goes on with the record it saved.

    Logs nothing.

    Args:
        min_decrease: smallest relative decrease between the first and the last window that passes; 0.3 is 30%.
        window: optimizer steps averaged at each end.
        max_rise: largest relative rise of the running window's mean above the lowest it had been; None allows any.
        monitor: logged metric that holds the loss of a step; where the module logs none by this name, or for None, the
            loss that ``training_step`` returns, averaged over the accumulation window.
        on_failure: "raise" a :class:`ConvergenceError` once fit has ended and everything is saved, or "warn".
    """

    name = "convergence"
    key = "convergence"

    def __init__(
        self,
        min_decrease: float = 0.3,
        window: int = 25,
        *,
        max_rise: float | None = None,
        monitor: str | None = "train_loss",
        on_failure: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}")
        if min_decrease >= 1:
            raise ValueError(f"min_decrease is a fraction below 1, got {min_decrease}; 0.3 is 30%")
        if max_rise is not None and max_rise < 0:
            raise ValueError(f"max_rise must not be negative, got {max_rise}")
        if on_failure not in ("warn", "raise"):
            raise ValueError(f"on_failure must be 'warn' or 'raise', got {on_failure!r}")
        self.min_decrease = min_decrease
        self.window = window
        self.max_rise = max_rise
        self.monitor = monitor
        self.on_failure = on_failure
        self._failure: str | None = None
        self.worst_rise = 0.0
        """Largest relative rise of the running mean above its lowest value so far."""
        self._step_loss = StepLoss(monitor)
        self._first: list[float] = []
        """The first losses of the run, up to two windows of them."""
        self._last: deque[float] = deque(maxlen=window)
        self._num_losses = 0
        self._not_finite: list[int] = []
        """Steps whose loss was not finite, the first of them."""
        self._best_mean: float | None = None
        self._started = False

    @property
    def state_key(self) -> str:
        """Names what is recorded; how it is judged may change when a run is resumed."""
        return state_key(self, monitor=self.monitor)

    @property
    def losses(self) -> list[float]:
        """The record that is judged: all losses of a short run, else the first and the last ``window``."""
        if self._num_losses == len(self._first):
            return list(self._first)
        return [*self._first[: self.window], *self._last]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or go on with, the record."""
        self._failure = None
        self._started = True
        self._step_loss.start(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the loss of a step."""
        if self._step_loss.update(trainer, outputs) and is_reading_step(trainer, trainer.global_step):
            self._read()

    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Verdict:
        """Compare both ends of the record, and write the verdict; that of a finished run stays."""
        self._read()
        verdict, numbers = self._judge(trainer)
        if writes_files(trainer) and (self._started or not _file(trainer).exists()):
            self._write(trainer, verdict, numbers)
        if verdict.passed is False and self.on_failure == "warn":
            rank_zero_warn(f"{self.name}: {verdict.detail}")
        return verdict

    def raise_failure(self) -> None:
        """Raise if the loss did not fall, where that was asked for, or if the verdict is not on disk."""
        if self._failure is not None:
            raise OSError(f"the verdict on convergence could not be written: {self._failure}")
        if self.verdict is not None and self.verdict.passed is False and self.on_failure == "raise":
            raise ConvergenceError(self.verdict.detail)

    def judge_early(self, trainer: pl.Trainer, exception: BaseException) -> Verdict:
        """A verdict without an answer rather than that of an earlier run."""
        self._read()
        verdict = Verdict(self.name, None, f"the run ended early: {type(exception).__name__}: {exception}")
        if self._started and writes_files(trainer):  # a resume that is refused leaves the file of its run
            self._write(trainer, verdict, {})
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """The two ends of the record, as plain types."""
        self._read()
        return {
            "first": list(self._first),
            "last": list(self._last),
            "num_losses": self._num_losses,
            "not_finite": list(self._not_finite),
            "best_mean": self._best_mean,
            "worst_rise": self.worst_rise,
            "source": self._step_loss.source,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; without one, the record starts with the resumed run."""
        if not state_dict:
            return
        self._first = list(state_dict["first"])
        complete = len(self._first) == state_dict["num_losses"]  # then for any window
        self._last = deque(self._first if complete else state_dict["last"], maxlen=self.window)
        self._num_losses = state_dict["num_losses"]
        self._not_finite = list(state_dict["not_finite"])
        self._best_mean = state_dict["best_mean"]
        self.worst_rise = state_dict["worst_rise"]
        self._step_loss.source = state_dict["source"]

    def _forget(self) -> None:
        self._first.clear()
        self._last.clear()
        self._num_losses = 0
        self._not_finite.clear()
        self._best_mean = None
        self.worst_rise = 0.0

    def _read(self) -> None:
        if self._step_loss.restarted:
            self._forget()
            self._step_loss.restarted = False
        for step, loss in self._step_loss.drain():
            if not math.isfinite(loss) and len(self._not_finite) < _MAX_NAMED:
                self._not_finite.append(step)
            if self._num_losses == len(self._first) < 2 * self.window:
                self._first.append(loss)
            self._num_losses += 1
            self._last.append(loss)
            if len(self._last) == self.window:
                mean = sum(self._last) / self.window
                if self._best_mean is None or mean < self._best_mean:
                    self._best_mean = mean
                elif self._best_mean != 0:
                    self.worst_rise = max(self.worst_rise, (mean - self._best_mean) / abs(self._best_mean))

    def _judge(self, trainer: pl.Trainer) -> tuple[Verdict, dict[str, Any]]:
        name = self.name
        if self._num_losses < 2:
            return Verdict(name, None, f"{self._num_losses} steps with a loss, needs at least 2"), {}
        window = min(self.window, self._num_losses // 2)
        if len(self.losses) < 2 * window:
            problem = (
                f"the window was raised to {self.window} steps when the run was resumed, and their losses are gone"
            )
            return Verdict(name, None, f"{problem}: set it back, or look into the record of the run"), {}
        not_finite = bool(self._not_finite)
        first, last = (float("nan"),) * 2 if not_finite else window_means(self.losses, self.window)
        if trainer.world_size > 1:  # the same numbers, hence the same verdict, on every rank
            own = torch.tensor([first, last, self.worst_rise], device=trainer.strategy.root_device)
            first, last, self.worst_rise = torch.as_tensor(trainer.strategy.reduce(own, reduce_op="mean")).tolist()
        numbers = {"first_mean": first, "last_mean": last, "worst_rise": self.worst_rise}
        if not (math.isfinite(first) and math.isfinite(last) and math.isfinite(self.worst_rise)):
            steps = ", ".join(map(str, self._not_finite)) or "another process"
            return Verdict(name, False, f"a loss is not finite (step {steps})"), numbers
        decrease = (first - last) / abs(first) if first else 0.0
        numbers["decrease"] = decrease
        detail = (
            f"loss {'fell' if decrease >= 0 else 'rose'} by {abs(decrease):.1%} "
            f"(mean of the first {window} steps {first:.4f}, of the last {last:.4f}), "
            f"asked for a fall of {self.min_decrease:.1%}, over {self._num_losses} steps"
        )
        passed = decrease >= self.min_decrease
        if self.max_rise is not None and self.worst_rise > self.max_rise:
            passed = False
            detail += (
                f"; the mean of {self.window} steps rose {self.worst_rise:.1%} above its lowest, "
                f"allowed are {self.max_rise:.1%}"
            )
        if not passed:
            detail += "; train longer, or look at the learning rate, the data and the label mask"
        return Verdict(name, passed, detail), numbers

    def _write(self, trainer: pl.Trainer, verdict: Verdict, numbers: dict[str, Any]) -> None:
        content = {
            **verdict._asdict(),
            **numbers,
            "num_steps": self._num_losses,
            "window": self.window,
            "min_decrease": self.min_decrease,
            "max_rise": self.max_rise,
            "loss_source": self.monitor if self._step_loss.source == "monitor" else "training_step",
        }
        try:
            write_json(_file(trainer), content)
        except OSError as error:  # raised at the end of fit, and never in place of what ended the run
            self._failure = str(error)
            rank_zero_warn(f"The verdict on convergence was not written: {error}")


def _file(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "convergence.json"
