"""What a run on CUDA devices is told at its start, and what of DistributedDataParallel adapters do without."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_lora.base.held_dtype import held_dtype
from lit_lora.wording import setting


def say_what_a_step_is(trainer: Trainer) -> None:
    """Several processes multiply the batch, and ``devices: auto`` takes every GPU of the machine: say so."""
    if trainer.world_size == 1:
        return
    count, accumulate = trainer.world_size, trainer.accumulate_grad_batches
    kind = "GPUs" if trainer.strategy.root_device.type == "cuda" else "processes"
    one = setting("trainer.devices", 1)
    rank_zero_info(
        f"{count} {kind}: a step takes {count * accumulate} micro-batches, {count} times as many as with {one}"
    )


def say_what_float16_needs(trainer: Trainer, model: Any) -> None:
    """A base in float16 without a loss scale loses gradients that are too small for it: say what to set."""
    scales = getattr(trainer.precision_plugin, "scaler", None) is not None
    if held_dtype(model) is torch.float16 and not scales:
        rank_zero_info(
            "the base is in float16, whose smallest gradients become zero without a loss scale: set "
            f"{setting('trainer.precision', '16-mixed')}"
        )


def let_go_of_buffers(trainer: Trainer, module: nn.Module) -> None:
    """Have buffers not sent from the first process to all others before every forward pass, where none is trained.

    Those of a frozen base do not change. Once training has started, DistributedDataParallel is built and has sent them.
    """
    wrapped = trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel) and not any(map(_trains_buffers, module.modules())):
        wrapped.broadcast_buffers = False
    # Lightning builds it on a stream of its own, of which torch warns once a process, up to Lightning 2.6.6:
    # https://github.com/Lightning-AI/pytorch-lightning/issues/21567
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)


def _trains_buffers(module: nn.Module) -> bool:
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return trains and next(module.buffers(recurse=False), None) is not None
