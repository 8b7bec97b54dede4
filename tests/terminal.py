"""A terminal to write to: a real pty of so many columns, and what a reader sees of it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminal:
    """What was written, and the rows that it makes on the screen."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.written = ""

    @property
    def frames(self) -> list[str]:
        """Everything that stood in a row at some time."""
        return [frame for frame in re.split(r"[\r\n]+", self.written) if frame.strip()]

    @property
    def rows(self) -> list[str]:
        """The screen at the end; a frame that is too wide takes two rows, as it would there."""
        rows, column = [""], 0
        for character in self.written:
            if character == "\r":
                column = 0
            elif character == "\n":
                rows.append("")
            else:
                if column == self.columns:
                    rows.append("")
                    column = 0
                rows[-1] = rows[-1][:column].ljust(column) + character + rows[-1][column + 1 :]
                column += 1
        return [row.rstrip() for row in rows]


@contextmanager
def terminal(monkeypatch: Any, columns: int, *, name: str = "xterm") -> Iterator[Terminal]:
    """Within, stdout and stderr are a terminal; afterwards what it shows is complete."""
    found = Terminal(columns)
    controller, device = pty.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(controller, 65536)
            except OSError:  # Linux: the other end is closed
                return
            if not data:
                return
            received.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch:
        patch.setenv("TERM", name)
        with os.fdopen(device, "w", encoding="utf-8") as stream:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            try:
                yield found
            finally:
                assert (sys.stdout, sys.stderr) == (stream, stream), "whoever takes the streams gives them back"
                stream.flush()
    reader.join(timeout=10)
    os.close(controller)
    found.written = b"".join(received).decode()
