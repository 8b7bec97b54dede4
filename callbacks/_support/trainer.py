"""What every callback here asks of a Trainer: when to log, how to agree over ranks, where to write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from torch import Tensor

from lit_lora.files.atomic import atomic_text

_DEFAULT_INTERVAL = 50  # steps; Trainer's own default, for a Trainer that never logs (barebones)


@runtime_checkable
class KnowsSourceLines(Protocol):
    """A data module that can tell where its training examples come from."""

    def source_lines(self, example_ids: Sequence[int]) -> list[int]:
        """The line of each example in its source; negative ids, which are fillers, give -1."""
        ...


@runtime_checkable
class KnowsChanges(Protocol):
    """A module that can tell which settings were changed when its run was resumed."""

    setting_changes: list[dict[str, Any]]
    """Each with its ``step``, and ``settings``: name -> as it was and as it is."""


def log_interval(trainer: pl.Trainer) -> int:
    """Optimizer steps from one logging step to the next; 0 where nothing is ever logged."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # public, set outside of the class
    return interval


def writes_files(trainer: pl.Trainer) -> bool:
    """Whether this process writes the run's files: the first one, unless the run is only a trial (fast_dev_run)."""
    trial: int | bool = trainer.fast_dev_run  # type: ignore[attr-defined]  # public, set outside of the class
    return trainer.is_global_zero and not trial


def is_logging_step(trainer: pl.Trainer, step: int) -> bool:
    """Whether Lightning hands the metrics of this optimizer step (counted from 1) to the loggers."""
    interval = log_interval(trainer)
    return interval > 0 and step % interval == 0


def is_reading_step(trainer: pl.Trainer, step: int) -> bool:
    """Whether to wait for the device at this step: the logging steps, or every 50th where nothing is ever logged."""
    return step % (log_interval(trainer) or _DEFAULT_INTERVAL) == 0


def log_metrics(trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: Mapping[str, Tensor | float]) -> None:
    """Log values of this step; without effect under ``Trainer(barebones=True)``, which forbids logging."""
    if metrics and not trainer.barebones:
        pl_module.log_dict(dict(metrics), on_step=True, on_epoch=False, batch_size=1)


def log_details(trainer: pl.Trainer, step: int, metrics: Mapping[str, float]) -> None:
    """Give values of this optimizer step (counted from 1) straight to the loggers, where they appear beside the others.

    For metrics by the dozen: Lightning goes through everything that went into ``log_dict`` again after every batch.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step - 1)  # Lightning counts the steps it logs from 0


def why_past_its_end(trainer: pl.Trainer) -> str:
    """Why a resumed run neither trained nor came to its end: it was past ``max_steps``. Else empty.

    Of a checkpoint past ``max_epochs`` Lightning makes an error.
    """
    if not 0 <= trainer.max_steps < trainer.global_step:
        return ""
    return f"the checkpoint is at step {trainer.global_step}, max_steps is {trainer.max_steps}"


def any_rank(trainer: pl.Trainer, flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must call it. Waits for the device where there are several."""
    return trainer.strategy.reduce_boolean_decision(flag, all=False) if trainer.world_size > 1 else flag


def norm_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """What to take norms of these in: float32, which torch refuses where there is a float64 among them."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def plain(value: Any) -> Any:
    """The value as JSON takes it: numbers that are not finite become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write as JSON, whole or not at all."""
    atomic_text(path, json.dumps(plain(content), indent=1) + "\n")


def state_key(callback: pl.Callback, **settings: object) -> str:
    """Under which name a checkpoint keeps the state of a callback.

    Args:
        callback: of any class.
        settings: that tell two callbacks of its class apart.
    """
    return f"{type(callback).__qualname__}{settings!r}"
