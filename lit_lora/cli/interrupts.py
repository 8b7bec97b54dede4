"""Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever its main thread happens to be. In a finalizer or a callback of the garbage
collector it is printed and forgotten, and the run would go on.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN_S = 0.05
"""Until a lost one is raised again: by then the finalizer has ended."""


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Within, a KeyboardInterrupt that nobody could catch is raised again."""
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            before(lost)
            return
        main = threading.main_thread().ident
        again = threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
