"""A file that only grows, and how far it had come: its length, and the SHA-256 of all that is in it.

What belongs to a file of this kind, such as a checkpoint to the metrics of its run, notes that mark in place of the
content. Whatever came later is known to be later, and a file that was changed up to the mark is known to be another.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_lora.files.atomic import atomic_write


class Mark(NamedTuple):
    """How far a log had come."""

    num_bytes: int
    sha256: str
    """Of these bytes, in hexadecimal."""


class AppendLog:
    """Written a piece at a time, each on the disk when :meth:`append` returns. It is not made before :meth:`begin`.

    Args:
        path: its folder must exist when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._digest = hashlib.sha256()
        self._begun = False

    @property
    def mark(self) -> Mark:
        """How far it has come."""
        return Mark(self._size, self._digest.hexdigest())

    @property
    def is_whole(self) -> bool:
        """Whether all that was written is there; a file that is gone or shorter has to begin anew."""
        return self._begun and self.path.is_file() and self.path.stat().st_size >= self._size

    def begin(self, content: bytes) -> None:
        """Let the file hold this, and nothing else. One that holds more, or something else, stays beside it.

        Raises:
            OSError: if it cannot be written.
        """
        found = self.path.read_bytes() if self.path.is_file() else b""
        if not content.startswith(found):
            number = 1
            while (aside := self.path.with_suffix(f".{number}{self.path.suffix}")).exists():
                number += 1
            self.path.rename(aside)
        if found != content:
            atomic_write(self.path, lambda file: file.write(content))
        self._size, self._digest, self._begun = len(content), hashlib.sha256(content), True

    def append(self, content: bytes) -> None:
        """Add to the end, in place of what an earlier call could write only in part.

        Raises:
            OSError: if it cannot be written, or not all of it; the file then holds what it held before.
        """
        with self.path.open("r+b", buffering=0) as file:  # a buffer would be written once more on closing
            try:
                file.truncate(self._size)
                file.seek(self._size)
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._size)
                raise
        self._size += len(content)
        self._digest.update(content)


def with_set_aside(path: Path) -> list[Path]:
    """A log, and what stays beside it from earlier beginnings."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.*{path.suffix}"))]


def read_to_mark(files: Sequence[Path], mark: Mark) -> bytes | None:
    """What a log held at a mark.

    Args:
        files: where it may be; the first that has it counts.
        mark: how far it had come.

    Returns:
        None if none of the files is there.

    Raises:
        ValueError: if there are some and none has it; says of each what is wrong.
    """
    if not mark.num_bytes:
        return b""
    problems = []
    for path in dict.fromkeys(path for path in files if path.is_file()):
        with path.open("rb") as file:
            content = file.read(min(mark.num_bytes, path.stat().st_size))
        if len(content) < mark.num_bytes:
            problems.append(f"{path} has {len(content):,} bytes, expected at least {mark.num_bytes:,}")
        elif hashlib.sha256(content).hexdigest() != mark.sha256:
            problems.append(f"{path} is not as it was: its first {mark.num_bytes:,} bytes have another SHA-256")
        else:
            return content
    if problems:
        raise ValueError("; ".join(problems))
    return None
