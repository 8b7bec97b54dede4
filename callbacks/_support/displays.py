"""Where progress is shown: in the last line of a terminal, or in lines of a log."""

from __future__ import annotations

import logging
import os
import sys
from abc import ABC, abstractmethod
from typing import Any, Literal, TextIO

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lit_lora.callbacks._support.progress_text import Progress, bar_format, line

_TERMINAL_INTERVAL_S = 0.25
_DEFAULT_COLUMNS = 80  # of a terminal that does not tell


def display(line_every_s: float, *, stream: Literal["stdout", "stderr"] = "stdout") -> Display:
    """What suits a stream: a line that is drawn again on a terminal; anywhere else, a line now and then.

    Args:
        line_every_s: seconds from one line to the next where it is no terminal.
        stream: of ``sys``; stderr for what prints its results to stdout.
    """
    on_terminal = getattr(sys, stream).isatty() and os.environ.get("TERM") != "dumb"
    return TerminalLine(stream) if on_terminal else LogLines(line_every_s, stream)


class Display(ABC):
    """Shows progress on a stream of ``sys``, by its name: what stands there may change meanwhile."""

    interval_s: float
    """Seconds from one showing to the next: what is shown is read from the device, which waits for it."""

    def __init__(self, stream: str) -> None:
        self._stream = stream

    @abstractmethod
    def show(self, progress: Progress) -> None:
        """Show how far a run is."""

    @abstractmethod
    def close(self, *, leave: bool) -> None:
        """End what is shown; what comes next has a line of its own.

        Args:
            leave: whether the last progress stays to be read.
        """

    @abstractmethod
    def back_to(self, progress: Progress) -> None:
        """What was shown since this is over."""

    def note(self, text: str) -> None:
        """Say something that stays to be read."""
        print(text, file=getattr(sys, self._stream), flush=True)  # into a pipe Python would hold lines back


class LogLines(Display):
    """A line each."""

    def __init__(self, interval_s: float, stream: str) -> None:
        super().__init__(stream)
        self.interval_s = interval_s

    def show(self, progress: Progress) -> None:
        """Print it."""
        self.note(line(progress))

    def back_to(self, progress: Progress) -> None:
        """It stands above."""

    def close(self, *, leave: bool) -> None:
        """There is nothing to end."""


class TerminalLine(Display):
    """tqdm's drawing, in one line that fits the terminal; what others print meanwhile appears above it."""

    interval_s = _TERMINAL_INTERVAL_S

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._bar: _Bar | None = None
        self._above: list[_Above] = []

    def show(self, progress: Progress) -> None:
        """Draw it in place of what was there."""
        columns = _columns(getattr(sys, self._stream) if self._bar is None else self._bar.terminal)
        layout = bar_format(progress, columns)
        if self._bar is None:
            self._bar = _Bar(getattr(sys, self._stream), progress, columns, layout)
            self._above = _put_above(self._bar)
            return
        self._bar.n, self._bar.total = progress.done, progress.total
        self._bar.ncols, self._bar.bar_format = columns, layout
        self._bar.refresh()

    def back_to(self, progress: Progress) -> None:
        """Draw it again."""
        self.show(progress)

    def close(self, *, leave: bool) -> None:
        """Let the line stand, or wipe it, and give the streams back."""
        if self._bar is None:
            return
        for above in self._above:
            above.give_back()
        self._bar.leave = leave
        self._bar.close()
        self._bar, self._above = None, []


class _Bar(Tqdm):
    monitor_interval = 0  # no thread that draws it beside us

    def __init__(self, terminal: TextIO, progress: Progress, columns: int, layout: str) -> None:
        self.terminal = terminal
        super().__init__(
            file=terminal, initial=progress.done, total=progress.total, ncols=columns, nrows=20, bar_format=layout
        )


class _Above:
    """Stands for a stream of the terminal: what is written to it moves the bar down."""

    def __init__(self, name: str, bar: _Bar) -> None:
        self._name = name
        self._bar = bar
        self._waiting = ""
        self._in_a_line = False
        self.stream: TextIO = getattr(sys, name)
        self._handlers = _handlers(self.stream)  # before anyone can ask for the name
        setattr(sys, name, self)
        for handler in self._handlers:
            handler.setStream(self)  # type: ignore[arg-type]

    def write(self, text: str) -> int:
        """Write whole lines; the rest waits for its end, or for a flush."""
        lines, newline, self._waiting = (self._waiting + text).rpartition("\n")
        if newline:
            self._put(lines + newline)
            self._bar.refresh()
        return len(text)

    def flush(self) -> None:
        """Write what waits: a prompt of a debugger is no whole line."""
        if self._waiting:
            self._put(self._waiting)
            self._waiting = ""
        self.stream.flush()

    def _put(self, text: str) -> None:
        if not self._in_a_line:
            self._bar.clear()
        self.stream.write(text)
        self.stream.flush()
        self._in_a_line = not text.endswith("\n")

    def give_back(self) -> None:
        """Put the stream back in its place, unless someone else has taken that."""
        self.flush()
        if getattr(sys, self._name) is self:
            setattr(sys, self._name, self.stream)
        for handler in self._handlers:
            if handler.stream is self:
                handler.setStream(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _put_above(bar: _Bar) -> list[_Above]:
    return [_Above(name, bar) for name in ("stdout", "stderr") if getattr(sys, name).isatty()]


def _handlers(stream: TextIO) -> list[logging.StreamHandler[Any]]:
    """Log handlers that write to the stream: they hold it, whatever ``sys.stderr`` is."""
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in known if isinstance(logger, logging.Logger) for handler in logger.handlers]
    return [h for h in handlers if isinstance(h, logging.StreamHandler) and vars(h).get("stream") is stream]


def _columns(terminal: TextIO) -> int:
    """Columns to fill: one less than there are, since some terminals wrap after the last one."""
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns
    except OSError:
        columns = 0
    return (columns or _DEFAULT_COLUMNS) - 1
