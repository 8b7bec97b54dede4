"""What dtype a run holds its base in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info

from lit_lora.base.load import resolve_dtype
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.training.start_source import checkpoint_to_load
from lit_lora.training.training_state import KEY
from lit_lora.wording import setting

_KEPT: ContextVar[str | None] = ContextVar("_KEPT", default=None)


@contextmanager
def kept_dtype(dtype: str | None) -> Iterator[None]:
    """Within, runs hold their bases as a run did that is repeated, where "auto" is set; None if that is not known."""
    token = _KEPT.set(dtype)
    try:
        yield
    finally:
        _KEPT.reset(token)


def base_dtype(dtype: str, device: torch.device, trainer: Any) -> str:
    """The dtype that is set; of "auto", that of the checkpoint that the run goes on from, else what the device takes.

    Processes on different processors take bfloat16 only if all of them do.

    Args:
        dtype: as set.
        device: where the base is loaded.
        trainer: the run's; None outside of one.
    """
    if dtype != "auto":
        return dtype
    takes = _name(resolve_dtype(dtype, device))
    path = None if trainer is None else checkpoint_to_load(trainer)
    saved = _KEPT.get() if path is None else read_checkpoint(path).get(KEY, {}).get("base_dtype")
    if saved is not None:
        if saved != takes:
            rank_zero_info(
                f"the base is in {saved}, as the run began; {setting('model.dtype', takes)} changes it to what this "
                "machine would take for a new run"
            )
        return str(saved)
    if device.type != "cpu":
        return takes
    if dist.is_initialized():
        taken: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(taken, takes)
        takes = takes if set(taken) == {takes} else "float32"
    if trainer is not None and takes == "bfloat16":
        rank_zero_info(
            "the base is held and multiplied in bfloat16, for which this processor has instructions; adapters, sums, "
            f"norms and the loss are in float32. {setting('model.dtype', 'float32')} does all in float32"
        )
    return takes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
