"""What a run trains with: from its data and its checkpoints to the record of the adapter that is written of it.

Any datamodule may describe its data, by a method ``trained_on`` that returns fields of ``TrainedOn``.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from lit_lora.base import trained_on
from lit_lora.base.trained_on import TrainedOn

_KEY = "trained_on"
"""Of the record in lit_lora's part of a checkpoint."""


def note_data(trainer: Trainer, model: nn.Module) -> None:
    """Note on a model what data it is trained on."""
    trained_on.note(model, **_described(trainer))


def save(model: nn.Module, state: dict[str, Any]) -> None:
    """Add the record to the state of a checkpoint."""
    state[_KEY] = trained_on.noted(model).to_json()


def saved(state: dict[str, Any]) -> TrainedOn:
    """The record in the state of a checkpoint; nothing is known where there is none."""
    return trained_on.from_json(state[_KEY]) if _KEY in state else TrainedOn()


def check_tokenizer(trainer: Trainer, record: TrainedOn) -> None:
    """Check that a checkpoint is validated, tested or asked for answers with the tokenizer that it was trained with.

    A resume compares all of the data (``data/batches/resume.py``).

    Raises:
        ValueError: saying in what they differ.
    """
    if trainer.state.fn == "fit" or not (now := _described(trainer)):
        return
    if difference := record.tokenizer_difference(**now):
        raise ValueError(
            f"data.tokenizer {now['tokenizer']} is not what the checkpoint was trained with, {record.tokenizer}: "
            f"{difference}. Set data.tokenizer as in training"
        )


def _described(trainer: Trainer) -> dict[str, Any]:
    describe = getattr(trainer.datamodule, "trained_on", None)  # type: ignore[attr-defined]  # public, set elsewhere
    return {} if describe is None else describe()
