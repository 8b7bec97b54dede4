"""What processes say to the user and to each other while data is prepared: who tokenizes, who waits, how far it is.

Ranks must not wait for each other in a collective here: tokenizing takes as long as it takes, and collectives have
timeouts. They wait for a lock on a file, which the system gives back when its holder ends in whatever way.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

FIRST_LINE_S = 2.0
LINE_EVERY_S = 10.0

_LOG = logging.getLogger("lightning.pytorch.lit_lora")
"""Shown where Lightning's own are; not only of the first rank, since any may be the one that tokenizes."""


def say(message: str) -> None:
    """Tell the user."""
    _LOG.info(message)


@contextmanager
def one_at_a_time(lock: Path, waiting_for: str) -> Iterator[bool]:
    """Within, no other process holds the lock.

    Where there can be no lock, the others are not waited for: they do the same work, and files of the cache are whole
    in any case.

    Args:
        lock: a file, which stays.
        waiting_for: what to say if another process holds it.

    Yields:
        Whether another process held it.
    """
    file_lock = FileLock(lock)
    waited = False
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            file_lock.acquire(timeout=0)
        except Timeout:
            waited = True
            say(f"waiting: {waiting_for} ({lock})")
            file_lock.acquire(poll_interval=0.2)
    except (OSError, NotImplementedError):
        pass
    try:
        yield waited
    finally:
        file_lock.release()


class TokenizingProgress:
    """Lines that say how far tokenizing is: soon a first one, then every few seconds.

    Args:
        name: of the source.
        total: how much there is to read, in units of what is done.
    """

    def __init__(self, name: str, total: int) -> None:
        self.name = name
        self.total = total
        self.num_rows = 0
        self._began_s = self._shown_s = time.monotonic()
        self._rows_found = self._found = 0
        """What an earlier start has done."""
        self._num_lines = 0

    def found(self, num_rows: int, done: int) -> None:
        """Rows that an earlier start has tokenized."""
        self.num_rows += num_rows
        self._rows_found, self._found = self.num_rows, done
        self._began_s = time.monotonic()

    def add(self, num_rows: int, done: int) -> None:
        """Rows that were tokenized, up to where the source is read."""
        if self._rows_found and not self._num_lines:
            say(f"tokenizing {self.name}: {self._rows_found:,} rows are there from an earlier start")
            self._num_lines += 1
        self.num_rows += num_rows
        now = time.monotonic()
        if now - self._shown_s < (LINE_EVERY_S if self._num_lines else FIRST_LINE_S):
            return
        self._shown_s = now
        self._num_lines += 1
        seconds = now - self._began_s
        rate = (self.num_rows - self._rows_found) / seconds
        line = f"tokenizing {self.name}: {self.num_rows:,} rows, {rate:,.0f} rows/s"
        if done > self._found:
            left_s = seconds * (self.total - done) / (done - self._found)
            line += f", {Tqdm.format_interval(max(0, left_s))} left"
        say(line)


def warn_not_cached(error: OSError) -> None:
    """Say that the work will be done again next time."""
    warnings.warn(f"the tokenized data is not cached: {error}", stacklevel=2)
