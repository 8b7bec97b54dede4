"""The data's part of a checkpoint: its state, checks on loading, and Lightning's counters made to agree with it.

Lightning counts batches per rank, and counts an epoch as done that ``max_steps`` or early stopping ended in the
middle. The data counts global micro-batches. After a checkpoint is loaded, the data is right and the counters follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule, Trainer


@runtime_checkable
class KnowsPosition(Protocol):
    """A data module whose state is a position: ``SFTDataModule``, and what is derived from it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position, or refuse one that means something else with these data."""

    def fingerprint(self) -> dict[str, Any]:
        """What a position in the data means."""
        ...


def data_state(checkpoint: Mapping[str, Any], trainer: Trainer) -> Mapping[str, Any] | None:
    """The position in a checkpoint that this run's data can continue from; None if there is none.

    Lightning keeps it under the name of the data module's class, which may be another by now: a class is renamed,
    derived from, moved into a function. What the position means is not in that name but in its fingerprint, which
    ``load_state_dict`` compares.

    Raises:
        ValueError: if there is a position, and these data know none.
    """
    found = positions_in(checkpoint)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # public, set outside of the class
    if isinstance(datamodule, KnowsPosition):
        return found.get(_key(datamodule), next(iter(found.values()), None))
    if found:
        raise ValueError(
            f"the checkpoint holds a position in the data of {next(iter(found))}, and this run's data come from "
            f"{'a plain loader' if datamodule is None else _key(datamodule)}, which cannot continue there: resume with "
            "the data that the run had, or start a new run"
        )
    return None


def positions_in(checkpoint: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The positions in data that a checkpoint holds, by the name of the data module's class."""
    return {
        name: state for name, state in checkpoint.items() if isinstance(state, Mapping) and "micro_batches" in state
    }


def _key(datamodule: Any) -> str:
    """As Lightning names it in a checkpoint."""
    return type(datamodule).__qualname__


def check_not_resumed(datamodule: LightningDataModule) -> None:
    """Check that a run whose data got no position is a new one.

    Raises:
        ValueError: if a checkpoint was loaded.
    """
    trainer = datamodule.trainer
    if trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is not None:
        name = _key(datamodule)
        raise ValueError(
            f"{trainer.ckpt_path} holds no position in the data of {name}, so training would start from their "
            f"beginning, unsaid: resume with the data that the run had. If {name} is only another name of its class, "
            "call lit_lora.data.batches.resume.align_loop_progress in the module's on_load_checkpoint, as "
            "LoRALightningModule does"
        )


def rank_batches_consumed(state: Mapping[str, Any], world_size: int) -> int:
    """Micro-batches that each of ``world_size`` ranks has consumed in the epoch.

    Args:
        state: from ``SFTDataModule.state_dict``; may come from another number of ranks.
        world_size: ranks now.

    Raises:
        ValueError: if the consumed micro-batches cannot be divided among the ranks.
    """
    consumed = state["consumed"]
    if consumed % world_size:
        raise ValueError(
            f"the checkpoint was saved after {consumed} micro-batches of the epoch, which {world_size} ranks cannot "
            f"share: resume with {state['world_size']} ranks, or from a checkpoint at the end of an optimizer step"
        )
    return int(consumed) // world_size


def align_loop_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Set the loop counters of a loaded checkpoint to the data's position, in place, and have Lightning find that.

    For ``LightningModule.on_load_checkpoint``. Does nothing to a checkpoint without data state. Needed to resume with
    another number of ranks, at the exact end of an epoch under ``max_steps``, and in an epoch that was stopped early.

    Args:
        checkpoint: as Lightning passes it to the hook.
        trainer: with the data module.

    Raises:
        ValueError: see :func:`data_state` and :func:`rank_batches_consumed`.
    """
    if trainer.state.fn != "fit":
        return
    state = data_state(checkpoint, trainer)
    if state is None or "loops" not in checkpoint:
        return
    checkpoint[_key(trainer.datamodule)] = state  # type: ignore[attr-defined]  # where Lightning will look for it
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    epoch, consumed = state["epoch"], rank_batches_consumed(state, trainer.world_size)
    finished = epochs["total"]["started"] - bool(consumed)
    if consumed == 0:
        _set(epochs["current"], ready=epoch, started=epoch, processed=epoch, completed=epoch)
        _set(epochs["total"], ready=finished, started=finished, processed=finished, completed=finished)
        _set(batches["current"], ready=0, started=0, processed=0, completed=0)
        total = batches["total"]["processed"]
        _set(batches["total"], ready=total, started=total, processed=total, completed=total)
    else:
        _set(epochs["current"], ready=epoch + 1, started=epoch + 1, processed=epoch, completed=epoch)
        _set(epochs["total"], ready=finished + 1, started=finished + 1, processed=finished, completed=finished)
        # A checkpoint from ``on_train_batch_end`` has one batch processed that is not completed; Lightning looks at
        # that.
        open_batches = batches["current"]["processed"] - batches["current"]["completed"]
        completed = consumed - open_batches
        _set(batches["current"], ready=consumed, started=consumed, processed=consumed, completed=completed)
    batches["is_last_batch"] = False


def _set(counters: dict[str, int], **values: int) -> None:
    counters.update(values)
