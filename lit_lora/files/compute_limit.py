"""A limit on what a file from elsewhere makes this process compute: a chat template is a program.

It runs in the interpreter, and a few bytes can keep that busy for ages or fill the memory. A timer of the process's own
CPU time interrupts it, so that a machine under load or a suspended job is no reason to stop. A process of its own would
cost seconds of imports for each. Python handles signals in the main thread only: elsewhere, and on Windows, there is no
limit; and one of memory on Linux alone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_SIZE = Path("/proc/self/statm")


class LimitExceeded(ValueError):
    """What was computed under a limit did not end within it."""


@contextmanager
def compute_limit(seconds: float, message: str, *, memory_bytes: int | None = None) -> Iterator[None]:
    """Stop what runs within after this much CPU time, or before it takes this much more memory.

    Args:
        seconds: of CPU time, over all threads.
        message: of the error: what took too long, and what to do.
        memory_bytes: address space beyond what the process has; None for no limit, and a MemoryError is one then.

    Raises:
        LimitExceeded: with the message.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(signum: int, frame: Any) -> NoReturn:
        raise LimitExceeded(message)

    previous = signal.signal(signal.SIGVTALRM, stop)
    # Again each second: an exception in a callback of the garbage collector is printed, and forgotten.
    left, interval = signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)
    try:
        with _memory_limit(memory_bytes):
            yield
    except MemoryError as error:
        if memory_bytes is None:
            raise
        raise LimitExceeded(message) from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, left, interval)
        signal.signal(signal.SIGVTALRM, previous)


@contextmanager
def _memory_limit(more_bytes: int | None) -> Iterator[None]:
    if more_bytes is None or not _SIZE.exists():
        yield
        return
    import resource

    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(_SIZE.read_text().split()[0]) * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit if before < 0 else min(limit, before), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
