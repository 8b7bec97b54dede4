"""How far a verb is: one line on a terminal, elsewhere lines now and then; on stderr, since stdout is for results."""

from __future__ import annotations

import time

from lit_lora.callbacks._support.displays import display
from lit_lora.callbacks._support.pace import Pace
from lit_lora.callbacks._support.progress_text import Progress

_LINE_EVERY_S = 30.0


class Counting:
    """Shows a count that rises, ``with Counting() as show: show("reading", 3, 10)``; one name after the other."""

    def __init__(self) -> None:
        self._display = display(_LINE_EVERY_S, stream="stderr")
        self._name = ""
        self._pace = Pace()
        self._shown_at_s = 0.0

    def __enter__(self) -> Counting:
        return self

    def __call__(self, name: str, done: int, of: int | None = None) -> None:
        """Show it where it is time to, and at the end."""
        now_s = time.monotonic()
        if name != self._name:
            self._name, self._pace, self._shown_at_s = name, Pace(), now_s
        self._pace.mark(now_s, done)
        if done == of or now_s - self._shown_at_s >= self._display.interval_s:
            self._shown_at_s = now_s
            left = self._pace.seconds_left(of) if done != of else None
            self._display.show(Progress(name, done, of, seconds_left=left))
        if done == of:
            self._display.close(leave=True)

    def __exit__(self, *_: object) -> None:
        self._display.close(leave=True)
