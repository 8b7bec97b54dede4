"""Training that starts from an adapter: what is taken from its folder, and what from a checkpoint of such a run.

What an adapter is (ranks, layers, scale, ...) comes from its folder; how it is trained (dropout, dtype) is set as for a
new one. A checkpoint holds all of the adapter, so a run that ``lit_lora.fit`` or the command line resumes no longer
needs the folder. A Trainer by itself says what it resumes from once the model is there, and needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import nn

from lit_lora.base.trained_on import note
from lit_lora.config import LoRAConfig
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.files.environment import CHECKPOINT_VARIABLE
from lit_lora.interchange.adapter_folder import Base, check_base, folder_record
from lit_lora.interchange.adapter_path import check_adapter_path
from lit_lora.interchange.peft_folder import StoredTensor
from lit_lora.interchange.stored_adapter import StoredAdapter, read_adapter, stored_checksum
from lit_lora.training import training_record, training_state
from lit_lora.training.new_tokens import AddsTokens, hold_new_tokens
from lit_lora.wording import setting

OF_TRAINING = ("lora_dropout", "adapter_dtype", "freeze_A")
"""Fields of ``LoRAConfig`` that say how an adapter is trained, not what it is."""

_READING: ContextVar[str | None] = ContextVar("_READING", default=None)


class StartingAdapter(NamedTuple):
    """What a run starts from."""

    stored: StoredAdapter
    lora: LoRAConfig
    """Its settings, with those of the training."""
    started_from: str | None
    """SHA-256 of the adapter that the run began with; None where it is in the folder."""

    def hold_new_tokens(self, model: nn.Module, lora: LoRAConfig, data: Any) -> LoRAConfig:
        """Make room in a base for the tokens that ``data`` adds, which the adapter has rows for.

        Args:
            model: without adapters.
            lora: as it was set.
            data: the run's; None where there is none.

        Returns:
            What holds in place of ``lora``.

        Raises:
            ValueError: if ``data`` adds tokens that the adapter has no rows for.
        """
        if not (isinstance(data, AddsTokens) and data.tokenizer and data.new_tokens.pieces):
            return self.lora  # the base gets its rows with the adapter
        held = hold_new_tokens(model, self.lora, data)
        had = {i for ids in self.lora.rows_to_train("").values() for i in ids}
        if more := sorted({i for ids in held.rows_to_train("").values() for i in ids} - had):
            raise ValueError(
                f"{setting('data.new_tokens')} adds the tokens {more[:5]}, for which the adapter in "
                f"{self.stored.source} has no rows: leave them out, or start a new adapter"
            )
        return self.lora


@contextmanager
def from_checkpoint(path: Any) -> Iterator[None]:
    """Within, a module that started from an adapter takes it from this checkpoint."""
    token = _READING.set(str(path))
    try:
        yield
    finally:
        _READING.reset(token)


def starting_adapter(adapter: str, lora: LoRAConfig) -> StartingAdapter:
    """What a run starts from, read as far as its settings need it.

    Args:
        adapter: folder in PEFT's format, or an id on the Hub.
        lora: as it was set beside it.

    Raises:
        FileNotFoundError: if there is no such adapter.
        ValueError: if it cannot be read, or ``lora`` contradicts it.
    """
    checkpoint = _READING.get() or os.environ.get(CHECKPOINT_VARIABLE)
    if checkpoint:
        return _of_checkpoint(checkpoint, lora)
    check_adapter_path(adapter)
    stored = read_adapter(adapter)
    return StartingAdapter(stored, as_continued(lora, stored.config, adapter), None)


def as_continued(lora: LoRAConfig, of_adapter: LoRAConfig, source: str) -> LoRAConfig:
    """The settings of an adapter that is trained on.

    Args:
        lora: as it was set beside the adapter.
        of_adapter: what the adapter is.
        source: of it, for the message.

    Raises:
        ValueError: naming what was set to something that is neither the default nor what the adapter has.
    """
    default = LoRAConfig()
    contradicting = [
        f"{setting(f'model.lora.{name}', value)} ({getattr(of_adapter, name)!r} there)"
        for name in (field.name for field in fields(LoRAConfig))
        if name not in OF_TRAINING
        and (value := getattr(lora, name)) != getattr(default, name)
        and _unordered(value) != _unordered(getattr(of_adapter, name))
    ]
    if contradicting:
        raise ValueError(
            f"{', '.join(contradicting)} contradicts the adapter in {source}, which training starts from: what an "
            f"adapter is comes from its folder, and only {' and '.join(OF_TRAINING)} can be set. Leave it out"
        )
    continued = replace(of_adapter, **{name: getattr(lora, name) for name in OF_TRAINING})
    continued.check_for_training()
    return continued


def _unordered(value: Any) -> Any:
    """A setting without the order of its names, of which PEFT writes lists in any."""
    return sorted(value) if isinstance(value, list) else value


def note_start(model: nn.Module, start: StartingAdapter, base: Base) -> str:
    """Note on a model what adapter its run began with, once its base is known to be that of the adapter.

    Args:
        model: with the adapter.
        start: what the run starts from.
        base: what the model was loaded from.

    Returns:
        The adapter's SHA-256.

    Raises:
        ValueError: if the adapter belongs to another base.
    """
    found = start.started_from
    if start.stored.folder is not None:
        folder = str(start.stored.folder)
        check_base(folder, folder_record(folder), model, base, other_base=None)
        found = stored_checksum(start.stored)
    note(model, started_from=found)
    return found or ""


def _of_checkpoint(path: str, lora: LoRAConfig) -> StartingAdapter:
    """The adapter of a run that started from one: its values come with the checkpoint."""
    checkpoint = read_checkpoint(path)
    state = training_state.read(checkpoint)
    if state["settings"].get("adapter") is None:
        raise ValueError(
            f"{setting('model.adapter')} has no effect with {path}, which holds an adapter and did not start from "
            "another one: leave it out"
        )
    saved = LoRAConfig(**state["settings"]["lora"])
    header = {
        name: StoredTensor(name.removeprefix("model.").replace(".copy.", "."), tuple(tensor.shape), "")
        for name, tensor in checkpoint["state_dict"].items()
    }
    stored = StoredAdapter(path, saved, header)
    return StartingAdapter(stored, as_continued(lora, saved, path), training_record.saved(state).started_from)
