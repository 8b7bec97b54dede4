"""Settings that differ between a checkpoint and the run that is resumed from it: refused, or applied and named.

Whatever is not listed here as having no effect is compared. So a setting that is added later is named at least.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from lightning.pytorch import Trainer
from torch.optim import Optimizer

NO_EFFECT = frozenset(
    {
        "base",  # which base it is, its hash says
        "adapter",  # which one the run began with; a checkpoint holds what became of it
        "revision",
        "dtype",  # what it came to is compared
        "trust_remote_code",
        "max_new_tokens",
        # The adapters are compared as they are in the model, and loaded with their values.
        *(f"lora.{name}" for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")),
        *(f"lora.{name}" for name in ("target_modules", "exclude_modules", "modules_to_save")),
        *(f"lora.{name}" for name in ("layers_to_transform", "layers_pattern", "init_lora_weights")),
        # Hyperparameters of the optimizer are compared as the optimizer has them.
        "optimization.learning_rate",
        "optimization.weight_decay",
    }
)
"""Settings of the module whose difference by itself changes nothing."""

REFUSED = ("quantization", "lora.adapter_dtype", "lora.freeze_A")
"""Settings of the module with which there is no going on when they differ; also what lies below them."""

TRAINER = (
    "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision", "max_steps", "max_epochs",
    "limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
)  # fmt: skip
"""Settings of the Trainer that change what is learned, or when and on what it is validated."""


@runtime_checkable
class Judging(Protocol):
    """A callback that says by which settings it judges: see :class:`lit_lora.callbacks.verdict.Check`."""

    without_effect: frozenset[str]

    def settings(self) -> dict[str, Any]:
        """By the names of their options."""


class Difference(NamedTuple):
    """One setting that was another."""

    name: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.saved)}, is {_shown(self.now)}"


def trainer_settings(trainer: Trainer) -> dict[str, Any]:
    """What is compared of a Trainer and of the checks it has, plain types, by the names of their options."""
    values = {f"trainer.{name}": getattr(trainer, name) for name in TRAINER}
    values |= {"trainer.devices x num_nodes": trainer.world_size}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        values |= callback.settings() if isinstance(callback, Judging) else {}
    seed = os.environ.get("PL_GLOBAL_SEED")  # where seed_everything leaves it
    return _plain({**values, "seed_everything (without effect on a resumed run)": int(seed) if seed else None})


def optimizer_settings(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    """Classes, and the hyperparameters of each group as they were given; plain types."""
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return {"optimizer": _class_name(optimizer), "lr_scheduler": _class_name(scheduler), "groups": _plain(groups)}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = "") -> list[Difference]:
    """Settings that are not the same, of nested mappings; a list is the same in another order where it is of names."""
    found: list[Difference] = []
    for name in {**saved, **now}:
        one, other = saved.get(name), now.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, prefix=f"{prefix}{name}.")
        elif _ordered(one) != _ordered(other):
            found.append(Difference(f"{prefix}{name}", one, other))
    return found


def module_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[Difference], list[Difference]]:
    """Settings of the module that differ: those with which there is no going on, and those that are applied."""
    found = [d for d in differences(saved, _plain(now)) if not _is_at_or_below(d.name, NO_EFFECT)]
    named = [(d, d._replace(name=f"model.{d.name}")) for d in found]
    refused = [full for d, full in named if _is_at_or_below(d.name, REFUSED)]
    return refused, [full for _, full in named if full not in refused]


def new_hyperparameters(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Hyperparameters of a parameter group that were given another value.

    Compared is what was given then and is given now, not what training has made of it: a schedule changes the rate.
    """
    given = {key: value for key, value in _plain(now).items() if key not in _IMPLEMENTATION}
    if "initial_lr" in given:  # the rate before the schedule had its say
        del given["lr"]
    return differences({key: saved.get(key) for key in given}, given)


_IMPLEMENTATION = ("params", "foreach", "fused", "capturable", "differentiable")
"""Of a parameter group: what it is of, and how it is computed, which may differ between devices."""


def _is_at_or_below(name: str, others: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _class_name(thing: Any) -> str | None:
    return None if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


def _plain(value: Any) -> Any:
    """As it comes back from a file: tensors as numbers, tuples as lists, what is neither as text."""
    return json.loads(json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other)))


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
