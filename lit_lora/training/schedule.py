"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant, per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_lora.wording import setting

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}
"""Share of the peak learning rate, by progress after the warm-up, in [0, 1]."""


def num_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, by ``max_steps`` or ``max_epochs``, whichever is sooner; None if neither."""
    if trainer.max_epochs == -1:
        return trainer.max_steps if trainer.max_steps != -1 else None
    steps = trainer.estimated_stepping_batches
    if trainer.ckpt_path is not None:
        # That has made the loaders, into which Lightning loads no state any more: a resumed run makes them again.
        trainer.fit_loop._combined_loader = None
    return int(steps) if 0 <= steps < math.inf else None


def check_length(scheduler: Any, num_steps: int | None) -> None:
    """Check that a schedule of a fixed length (``OneCycleLR``) is as long as the run.

    Raises:
        ValueError: if the run goes on after its end.
    """
    total_steps = getattr(scheduler, "total_steps", None)
    if total_steps is not None and (num_steps is None or num_steps > total_steps):
        run = f"{num_steps} steps" if num_steps is not None else "no end in steps"
        raise ValueError(
            f"model.lr_scheduler {type(scheduler).__name__} has {total_steps} steps, and the run {run}: make them agree"
        )


class StepOnPlateau(Callback):
    """Steps a ``ReduceLROnPlateau`` after each validation, before a checkpoint of it is written.

    Lightning does so after the checkpoint, and a run that resumes from there does it never.

    Args:
        monitor: logged metric to wait for.
    """

    def __init__(self, monitor: str) -> None:
        super().__init__()
        self.monitor = monitor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there will be validations.

        Raises:
            ValueError: if there is no validation data.
        """
        if stage == "fit" and not trainer.enable_validation:
            raise ValueError(
                "model.lr_scheduler ReduceLROnPlateau steps after each validation, and there is none: set "
                "data.validation or data.validation_fraction"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the step.

        Raises:
            ValueError: if the metric was not logged.
        """
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"model.lr_scheduler monitor {self.monitor!r} is not logged; logged are {known}")
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        scheduler.step(trainer.strategy.broadcast(float(value)))  # may differ between ranks: the first decides


def build(
    optimizer: Optimizer,
    name: Literal["cosine", "linear", "constant"],
    *,
    num_steps: int | None,
    warmup_ratio: float,
) -> LambdaLR:
    """A schedule to be stepped after every optimizer step.

    No step is wasted: the first has a learning rate above zero, and so has the last.

    Args:
        optimizer: its learning rates are the peak.
        name: key of ``SCHEDULES``.
        num_steps: optimizer steps of the whole run; None where nobody can know, which only "constant" allows.
        warmup_ratio: share of ``num_steps`` over which the learning rate rises.

    Raises:
        ValueError: for an unknown name, or a schedule that needs ``num_steps`` and has none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"lr_schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if num_steps is None:
        if name != "constant":
            ends = f"{setting('trainer.max_steps')} or {setting('trainer.max_epochs')}"
            raise ValueError(f"lr_schedule {name!r} needs an end: set {ends}")
        return LambdaLR(optimizer, lambda step: 1.0)
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    decay = SCHEDULES[name]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return decay(min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps)))

    return LambdaLR(optimizer, factor)
