"""A model that is larger than one device, at work: its base divided among the processes that torchrun started.

All of them do the same work on the same prompts, each with its share of the weights, and the first one speaks. Dividing
the prompts as well would make it faster, and was left out: what counts here is that the model fits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lit_lora.base.shards import Sharding

_IN_USE: ContextVar[Sharding | None] = ContextVar("sharding", default=None)


def sharding_in_use() -> Sharding | None:
    """Among which processes a base is to be divided now; None for none."""
    return _IN_USE.get()


@contextmanager
def among_processes() -> Iterator[None]:
    """Within, :func:`lit_lora.load` divides the base among all processes that torchrun started.

    Each must do the same within; what is printed, only the first one prints.
    """
    on_cuda = torch.cuda.is_available()
    own = int(os.environ["LOCAL_RANK"])
    if on_cuda:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    token = _IN_USE.set(Sharding(init_device_mesh("cuda" if on_cuda else "cpu", (dist.get_world_size(),))))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if dist.get_rank() == 0 else nowhere):
            yield
        # The first one's end takes along what the others still find each other by.
        dist.barrier(device_ids=[own] if on_cuda else None)
    finally:
        _IN_USE.reset(token)
        dist.destroy_process_group()
