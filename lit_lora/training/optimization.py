"""The optimizer and its schedule, as Lightning wants them: built in, or the user's own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_lora.adapters.fixed_half import FixedHalf
from lit_lora.config import OptimizationConfig
from lit_lora.training import optimizer_trial, resume_settings, schedule
from lit_lora.training.lora_fa import LoRAFA
from lit_lora.training.resume_settings import Difference
from lit_lora.training.training_point import has_two_points


@dataclass(frozen=True)
class Optimization:
    """Settings of the module that decide how adapters are optimized."""

    config: OptimizationConfig
    optimizer: OptimizerCallable | None
    """Replaces AdamW, with its learning rate and weight decay."""
    lr_scheduler: LRSchedulerCallable | None
    """Replaces the built-in schedule."""

    def try_out(self, trainer: Trainer) -> list[Callback]:
        """Find out before the model is loaded what optimizer and schedule cannot do; two small parameters suffice.

        Returns:
            What the schedule needs of the Trainer.

        Raises:
            ValueError: naming the setting, and what to set instead.
        """
        endless = trainer.max_steps == -1 and trainer.max_epochs == -1
        if self.lr_scheduler is None and self.config.lr_schedule != "constant" and endless:
            raise ValueError(
                f"lr_schedule {self.config.lr_schedule!r} comes down towards an end in steps, and none is known: set "
                "trainer.max_steps or trainer.max_epochs (trainer.max_time may still end the run sooner), or "
                "model.optimization.lr_schedule constant"
            )
        if self.optimizer is None and self.lr_scheduler is None:
            return []
        device = trainer.strategy.root_device
        with optimizer_trial.own_random_state(device):
            parameters = optimizer_trial.parameters(device)
            built = optimizer_trial.build("optimizer", self._optimizer, parameters)
            optimizer_trial.check(
                built,
                accumulates=trainer.accumulate_grad_batches > 1,
                gives_closure=getattr(trainer.precision_plugin, "scaler", None) is None,
            )
            if self.lr_scheduler is None:
                if has_two_points(built) and self.config.lr_schedule != "constant":
                    raise ValueError(
                        f"model.optimizer {type(built).__name__} averages in place of a schedule, and lr_schedule is "
                        f"{self.config.lr_schedule!r}: set model.optimization.lr_schedule constant"
                    )
                return []
            scheduler = optimizer_trial.build("lr_scheduler", self.lr_scheduler, built)
        if trainer.max_epochs == -1:
            schedule.check_length(scheduler, schedule.num_steps(trainer))
        if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            return []
        if not isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "model.lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau does not say which metric it waits for: "
                "use lightning.pytorch.cli.ReduceLROnPlateau, with monitor val_loss"
            )
        return [schedule.StepOnPlateau(scheduler.monitor)]

    def configure(
        self, trainer: Trainer, parameters: Mapping[str, nn.Parameter], fixed: Sequence[FixedHalf] = ()
    ) -> dict[str, Any]:
        """What ``configure_optimizers`` returns.

        Args:
            trainer: says how many steps there are.
            parameters: all that train, by name.
            fixed: layers of which B alone is trained.
        """
        built = self._optimizer(list(parameters.values()), learns_faster(parameters), fixed)
        if getattr(built, "_step_supports_amp_scaling", False):
            # Left to unscale gradients itself, a fused optimizer would do so after they are logged; and Lightning then
            # refuses to clip them, without a loss scaler too (https://github.com/Lightning-AI/pytorch-lightning/issues/21435).
            built._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.lr_scheduler is None:
            num_steps = schedule.num_steps(trainer)
            scheduler = schedule.build(
                built, self.config.lr_schedule, num_steps=num_steps, warmup_ratio=self.config.warmup_ratio
            )
            return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        own = self.lr_scheduler(built)
        if isinstance(own, ReduceLROnPlateau):  # StepOnPlateau takes its steps; Lightning keeps its state
            never = {"interval": "step", "frequency": sys.maxsize}
            return {"optimizer": built, "lr_scheduler": {"scheduler": own, "monitor": own.monitor, **never}}
        if hasattr(own, "total_steps"):
            schedule.check_length(own, schedule.num_steps(trainer))
        return {"optimizer": built, "lr_scheduler": {"scheduler": own, "interval": "step"}}

    def _optimizer(
        self,
        parameters: list[nn.Parameter],
        faster: Sequence[nn.Parameter] = (),
        fixed: Sequence[FixedHalf] = (),
    ) -> Optimizer:
        if self.optimizer is not None:
            return self.optimizer(parameters)
        config = self.config
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if config.lora_plus_ratio != 1 and faster:
            known = {id(parameter) for parameter in faster}
            groups = [{"params": [parameter for parameter in parameters if id(parameter) not in known]}]
            groups.append({"params": list(faster), "lr": config.learning_rate * config.lora_plus_ratio})
        groups = [group for group in groups if group["params"]]
        options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
        return LoRAFA(groups, fixed, **options) if fixed else torch.optim.AdamW(groups, **options)


def learns_faster(parameters: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """What LoRA+ gives its higher rate: B of layers, and vectors, as PEFT's ``create_loraplus_optimizer``.

    Args:
        parameters: all that train, by name.
    """
    return [p for name, p in parameters.items() if ".lora_B." in name or (p.ndim == 1 and "lora_embedding" not in name)]


_OPTIONS = {
    "lr": "optimization.learning_rate",
    "initial_lr": "optimization.learning_rate",
    "weight_decay": "optimization.weight_decay",
}
"""Settings of the module that an optimizer knows by other names; what else it has, it was given itself."""


def apply_given(
    optimizer: Optimizer, scheduler: Any, saved: list[dict[str, Any]], given: list[dict[str, Any]]
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
    return [d._replace(name=_OPTIONS.get(d.name, f"optimizer.{d.name}")) for d in found]
