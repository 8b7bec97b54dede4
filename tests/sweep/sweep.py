"""All architectures, each in a process of its own, and their table.

The processes are forks of one that has imported everything, so that an architecture takes a second; one that crashes,
hangs or takes too much memory ends alone.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tests.sweep.compare import Result, compare

TIME_LIMIT_S = 120.0
MEMORY_LIMIT_BYTES = 6 * 2**30
NUM_PROCESSES = 2


@dataclass(frozen=True)
class Architecture:
    """A key of one of transformers' mappings."""

    model_type: str
    seq2seq: bool = False


def architectures() -> list[Architecture]:
    """Every one that the installed transformers knows, causal ones first."""
    return [
        *(Architecture(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        *(Architecture(name, seq2seq=True) for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ]


def run_all(chosen: Iterable[Architecture]) -> dict[Architecture, Result]:
    """Compare these architectures, some at a time."""
    context = multiprocessing.get_context("fork")
    waiting, running, results = list(chosen), [], {}
    order = list(waiting)
    while waiting or running:
        while waiting and len(running) < NUM_PROCESSES:
            receiver, sender = context.Pipe(duplex=False)
            architecture = waiting.pop(0)
            process = context.Process(target=_compare, args=(architecture, sender), daemon=True)
            process.start()
            sender.close()
            running.append((architecture, process, receiver, time.monotonic() + TIME_LIMIT_S))
        multiprocessing.connection.wait([receiver for _, _, receiver, _ in running], timeout=1.0)
        for job in list(running):
            architecture, process, receiver, deadline = job
            if receiver.poll():
                results[architecture] = _received(receiver)
            elif time.monotonic() > deadline:
                results[architecture] = Result("", "different", why=f"not done after {TIME_LIMIT_S:.0f} s")
            else:
                continue
            process.kill()
            process.join()
            running.remove(job)
    return {architecture: results[architecture] for architecture in order}


def _compare(architecture: Architecture, sender: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    try:
        sender.send(compare(architecture.model_type, seq2seq=architecture.seq2seq))
    except Exception as error:  # whatever it is, it belongs into the table
        sender.send(Result("", "different", why=f"{type(error).__name__}: {error}"))


def _received(receiver: Connection) -> Result:
    try:
        return receiver.recv()
    except EOFError:
        return Result("", "different", why="its process ended without a result")
