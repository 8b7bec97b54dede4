"""The optimizer and its schedule, as Lightning wants them: built in, or the user's own."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lit_lora import resume_settings, schedule
from lit_lora.resume_settings import Difference


def configure(
    trainer: L.Trainer,
    parameters: list[nn.Parameter],
    *,
    optimizer: OptimizerCallable | None,
    learning_rate: float,
    weight_decay: float,
    lr_scheduler: LRSchedulerCallable | None,
    lr_schedule: Literal["cosine", "linear", "constant"],
    warmup_ratio: float,
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns, with a schedule that steps with the optimizer.

    Args:
        trainer: says how many steps there are, and whether there is a loss scaler.
        parameters: all that train.
        optimizer: replaces AdamW, with its learning rate and weight decay.
        learning_rate: peak.
        weight_decay: of AdamW.
        lr_scheduler: replaces the built-in schedule.
        lr_schedule: what follows the warm-up.
        warmup_ratio: share of all steps over which the learning rate rises.

    Raises:
        ValueError: for a schedule that waits for a metric.
    """
    if optimizer is not None:
        built = optimizer(parameters)
    else:
        # A fused optimizer under a loss scaler would unscale by itself, after norms are logged and clipped.
        fused = getattr(trainer.precision_plugin, "scaler", None) is None
        built = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)
    if lr_scheduler is None:
        scheduler: Any = schedule.build(
            built, lr_schedule, num_steps=schedule.num_steps(trainer), warmup_ratio=warmup_ratio
        )
    else:
        scheduler = lr_scheduler(built)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ValueError(
                "lr_scheduler ReduceLROnPlateau needs a monitor: subclass and override configure_optimizers"
            )
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def apply_given(
    optimizer: torch.optim.Optimizer, scheduler: Any, saved: list[dict[str, Any]], given: list[dict[str, Any]]
) -> list[Difference]:
    """Set hyperparameters of a restored optimizer to what is given now, where that is not what was given before.

    Args:
        optimizer: with the state of a checkpoint, which also brought its hyperparameters.
        scheduler: its schedule, likewise restored; None for none.
        saved: of each parameter group what was given when the run began.
        given: what is given now.

    Returns:
        What differs.
    """
    found: list[Difference] = []
    for index, (group, before, now) in enumerate(zip(optimizer.param_groups, saved, given, strict=True)):
        for difference in resume_settings.new_hyperparameters(before, now):
            name = difference.name
            if name in ("lr", "initial_lr"):
                group["lr"] = group["lr"] * (now[name] / before[name]) if before.get(name) else now[name]
                if name == "initial_lr" and hasattr(scheduler, "base_lrs"):
                    scheduler.base_lrs[index] = now[name]
            if name != "lr":
                group[name] = now[name]
            if index == 0 or difference not in found:
                found.append(difference)
    if isinstance(scheduler, LambdaLR):  # its form may have changed too: with the number of steps, or by name
        for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["lr"] = base * factor(scheduler.last_epoch)
    return [d._replace(name="learning_rate" if d.name in ("lr", "initial_lr") else d.name) for d in found]
