"""Ctrl-C and termination while a batch is running: noted at once, acted upon when the batch is done.

Raising inside a batch would leave half an update behind, and Lightning's own handler starts a collective from inside
the signal handler, where it can meet another one (lightning 2.6, ``_SignalConnector._sigterm_notifier_fn``).
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "termination"}


class StopSignals:
    """Takes SIGINT and SIGTERM over from ``install`` to ``restore``; in the main thread only, as Python has it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over."""
        self.received = None
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {signum: signal.signal(signum, self._note) for signum in NAMES}

    def restore(self) -> None:
        """Give the signals back."""
        previous, self._previous = self._previous, {}
        for signum, handler in previous.items():
            if signal.getsignal(signum) == self._note:
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def exception(self) -> BaseException:
        """What the signal means; for a rank that got none itself, a termination."""
        return KeyboardInterrupt() if self.received == signal.SIGINT else SIGTERMException()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signum
        # Not through logging or print: their locks may be held by the code that was interrupted.
        again = " Press Ctrl-C again to stop at once." if signum == signal.SIGINT else ""
        sys.__stderr__ and sys.__stderr__.write(
            f"\n{NAMES[signal.Signals(signum)]}: stopping after this batch.{again}\n"
        )
