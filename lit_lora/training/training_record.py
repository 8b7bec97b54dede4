"""What a run trains with: from its data and its checkpoints to the record of the adapter that is written of it.

Any datamodule may describe its data, by a method ``trained_on`` that returns fields of ``TrainedOn``.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from lit_lora.base import trained_on
from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import LoRAConfig, OptimizationConfig, QuantizationConfig, StepConfig

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


def settings_as_trained(state: dict[str, Any], *, same_base: bool) -> dict[str, Any]:
    """The settings of the module whose state is in a checkpoint, with what was found where they left it open.

    Args:
        state: lit_lora's part of the checkpoint.
        same_base: whether its base is taken from where it was.
    """
    settings = dict(state.get("settings", {}))
    if (commit := saved(state).revision) and same_base:  # where none was asked for
        settings["revision"] = commit
    if settings.get("dtype") == "auto" and state.get("base_dtype"):
        settings["dtype"] = state["base_dtype"]
    kinds = {"lora": LoRAConfig, "quantization": QuantizationConfig}
    kinds |= {"optimization": OptimizationConfig, "step": StepConfig}
    return settings | {n: kind(**settings[n]) for n, kind in kinds.items() if settings.get(n) is not None}


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
