"""``SHA256SUMS`` in the folder of a run: what it left, in the format of ``sha256sum``, which checks it with ``-c``."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lit_lora.files.atomic import atomic_write

FILE_NAME = "SHA256SUMS"
_PATTERNS = ("*.yaml", "metrics*.jsonl", "*.json", "adapter/*", "adapter-best/*", "checkpoints/*.ckpt")
"""Not the page, which can be written again, nor the log, which is one more copy of the metrics."""


def write_sums(folder: Path) -> None:
    """Write the sums of what is there.

    Raises:
        OSError: if a file cannot be read, or the sums cannot be written.
    """
    paths = sorted(path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file())
    lines = [f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    atomic_write(folder / FILE_NAME, lambda file: file.write("".join(lines).encode()))


def differences(folder: Path) -> tuple[int, list[str]]:
    """How many files there are sums of, and which of these are not as they were.

    Raises:
        ValueError: if the sums are not as :func:`write_sums` writes them.
        OSError: if a file cannot be read.
    """
    problems = []
    lines = (folder / FILE_NAME).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if match is None or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            raise ValueError(f"line {number} of {FILE_NAME} is no sum of a file in the folder: {line!r:.100}")
        path = folder / match[2]
        if not path.is_file():
            problems.append(f"{match[2]} is gone")
        elif _sum(path) != match[1]:
            problems.append(f"{match[2]} has changed")
    return len(lines), problems


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
