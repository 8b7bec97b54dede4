"""The loss of every optimizer step, collected without waiting for the device.

Two sources. A metric that the module logs (``train_loss``) is the right one where there is one: the value that
``training_step`` returns may be a sum, scaled for accumulation, or otherwise not comparable between steps. Without the
metric, the returned losses are averaged over the micro-batches of the step. The source is chosen once: the two are
never mixed in one record.

A step that had nothing to learn from (every label masked, or its update skipped) has no loss, whatever number stands
there. Where the module logs ``train_targets``, how many targets a step learned from, steps with none are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

TARGETS = "train_targets"


class StepLoss:
    """Collects one loss a step in ``on_train_batch_end``; :meth:`drain` hands them over as numbers.

    Args:
        monitor: name of the logged metric to prefer; None to use the returned loss only.
        keep: steps to keep until they are drained, the newest; None for all.
    """

    def __init__(self, monitor: str | None, *, keep: int | None = None) -> None:
        self.monitor = monitor
        self.source: Literal["monitor", "output"] | None = None
        self.restarted = False
        """Set when the metric turned up one step late: what was recorded before must be dropped."""
        self._num_recorded = 0
        self._last_step = 0
        self._micro_losses: list[Tensor] = []
        self._pending: deque[tuple[int, Tensor]] = deque(maxlen=keep)
        """Step, and on the device its loss and its number of targets, ``(2,)``."""

    def start(self, trainer: pl.Trainer) -> None:
        """Call in ``on_train_start``."""
        self._last_step = trainer.global_step
        self._micro_losses.clear()

    def update(self, trainer: pl.Trainer, outputs: Any) -> bool:
        """Take in one micro-batch; returns whether an optimizer step was taken."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Lightning has divided what training_step returned by accumulate_grad_batches.
            self._micro_losses.append(loss.detach().float() * trainer.accumulate_grad_batches)
        if trainer.global_step == self._last_step:
            return False
        self._last_step = trainer.global_step
        self._record(trainer)
        self._micro_losses.clear()
        return True

    def drain(self) -> list[tuple[int, float]]:
        """The (step, loss) pairs since the last call. One wait for the device, where the losses lie on one."""
        if not self._pending:
            return []
        steps = [step for step, _ in self._pending]
        values = torch.stack([value for _, value in self._pending]).tolist()
        self._pending.clear()
        return [(step, loss) for step, (loss, targets) in zip(steps, values, strict=True) if targets]

    def _record(self, trainer: pl.Trainer) -> None:
        metrics = trainer.callback_metrics
        logged = metrics.get(self.monitor) if self.monitor is not None else None
        if self.source is None:
            self.source = "output" if logged is None else "monitor"
        elif self.source == "output" and logged is not None and self._num_recorded == 1:
            # A module that logs in its own on_train_batch_end is heard one step late, since callbacks come first. Later
            # than that it is an epoch's mean that lingers, and not a loss per step.
            self.source, self.restarted = "monitor", True
            self._pending.clear()
        self._num_recorded += 1
        if self.source == "monitor" and logged is not None:
            loss = logged.detach().float().reshape(())
        elif self.source == "output" and self._micro_losses:
            loss = torch.stack(self._micro_losses).mean()
        else:
            return
        count = metrics[TARGETS].detach().to(loss).reshape(()) if TARGETS in metrics else torch.ones_like(loss)
        self._pending.append((self._last_step, torch.stack([loss, count])))
