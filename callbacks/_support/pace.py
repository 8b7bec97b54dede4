"""How fast a count grows, and when it will have come to its total."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

_WINDOW_S = 30.0


class _Mark(NamedTuple):
    at_s: float
    busy_s: float
    """Without pauses."""
    done: int
    amount: int


class Pace:
    """Marks of a count over time. The first one starts the clock, so that what comes before it (warm-up) is no speed.

    Speed is that of the last half minute, pauses left out. The time left follows the whole run with its pauses, which
    will come again.
    """

    def __init__(self) -> None:
        self._first: _Mark | None = None
        self._recent: deque[_Mark] = deque()
        self._paused_s = 0.0
        self._paused_at_s: float | None = None

    @property
    def has_started(self) -> bool:
        """Whether there is a first mark."""
        return self._first is not None

    def pause(self, now_s: float) -> None:
        """What follows is no work on what is counted."""
        self._paused_at_s = now_s

    def resume(self, now_s: float) -> None:
        """The end of a pause."""
        if self._paused_at_s is not None:
            self._paused_s += now_s - self._paused_at_s
            self._paused_at_s = None

    def mark(self, now_s: float, done: int, amount: int = 0) -> None:
        """Note how far the count is.

        Args:
            now_s: on any clock that does not go back.
            done: the count.
            amount: of what is processed with it (tokens), so far.
        """
        mark = _Mark(now_s, now_s - self._paused_s, done, amount)
        self._first = self._first or mark
        self._recent.append(mark)
        while len(self._recent) > 2 and mark.at_s - self._recent[1].at_s >= _WINDOW_S:
            self._recent.popleft()

    def per_s(self) -> tuple[float, float] | None:
        """Recent speed of count and amount; None where none is known yet."""
        if len(self._recent) < 2:
            return None
        first, last = self._recent[0], self._recent[-1]
        elapsed_s = last.busy_s - first.busy_s
        if elapsed_s <= 0:
            return None
        return (last.done - first.done) / elapsed_s, (last.amount - first.amount) / elapsed_s

    def seconds_left(self, total: int | None) -> float | None:
        """Until the count comes to its total; None where it is not known."""
        if total is None or self._first is None or self._recent[-1].done <= self._first.done:
            return None
        last = self._recent[-1]
        return (last.at_s - self._first.at_s) / (last.done - self._first.done) * max(total - last.done, 0)
