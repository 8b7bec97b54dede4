"""The settings of a run, as plain types, for every logger.

Not by Lightning's ``save_hyperparameters``: that puts them into checkpoints too, from where its command line lets them
override what is given when a run is resumed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Trainer

_OF_TRAINER = (
    "max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision",
)  # fmt: skip


@runtime_checkable
class KnowsSettings(Protocol):
    """A data module that says what it was built with."""

    def settings(self) -> dict[str, Any]:
        """Names and values, as on construction."""
        ...


def log(trainer: Trainer, model: Mapping[str, Any]) -> None:
    """Give every logger the settings of model, data, optimizer and Trainer.

    Args:
        trainer: with its optimizers.
        model: settings of the module.
    """
    if not trainer.loggers:
        return
    optimizer = trainer.optimizers[0]
    data = trainer.datamodule  # type: ignore[attr-defined]  # public, set outside of the class
    settings = {
        "model": model,
        "data": data.settings() if isinstance(data, KnowsSettings) else None,
        "optimizer": {"name": type(optimizer).__name__, **optimizer.defaults},
        "lr_scheduler": [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs],
        "trainer": {**{name: getattr(trainer, name) for name in _OF_TRAINER}, "processes": trainer.world_size},
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }
    for logger in trainer.loggers:
        logger.log_hyperparams(plain(settings))


def plain(value: Any) -> Any:
    """The value in types that every logger takes: what is no number, text or nest of those becomes text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    return str(value)
