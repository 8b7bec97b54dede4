"""Learning-rate schedules: a linear warm-up, then cosine, linear or constant, per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from lightning.pytorch import Trainer
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
    """Optimizer steps of the whole run; None where nobody can know."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) else None


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
