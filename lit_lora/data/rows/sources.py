"""What a source's name stands for: files, or a dataset of the ``datasets`` library; its rows, and a digest of them.

JSON, JSONL and CSV are read with the standard library, so that starting on a local file imports neither ``datasets``
nor pandas.
"""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from lit_lora.data.rows import hub
from lit_lora.data.rows.readers import COMPRESSED, SUFFIXES, Block, file_blocks, rows_of, suffix_of
from lit_lora.data.rows.rows import Problems, Row, shown, shown_names
from lit_lora.files.meant import closest, did_you_mean

__all__ = [
    "Problems",
    "Row",
    "shown",
    "shown_names",
]  # a row and its report: where readers of this module look for them

_SPLIT_NAMES = re.compile(
    r"(^|[\W_])(train|training|test|testing|valid|validation|val|dev|eval)([\W_]|$)", re.IGNORECASE
)
"""In the name of a file of a folder: it is divided into splits, which ``datasets`` tells apart."""


def is_file_source(source: str) -> bool:
    """Whether ``source`` names a file or a pattern of files rather than a dataset on the Hub, or a folder."""
    path = Path(source).expanduser()
    if path.is_file():
        return True
    if path.is_dir() or Path(source.rpartition("@")[0] or source).expanduser().is_dir():
        return False
    return (
        _has_suffix(path)
        or source.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w.\[\]:%-]+)?", source)
        or (path.parent != Path() and path.parent.is_dir())
    )


def files_of(source: str) -> list[Path] | None:
    """The files that ``source`` stands for, in the order of their names; None where it is for ``datasets`` to read.

    Args:
        source: a file, a pattern with ``*``, or a folder of data files. What ``save_to_disk`` wrote, and a folder whose
            files are named after splits, is for ``datasets``.

    Raises:
        FileNotFoundError: if there is no such file; names the closest file names beside it.
        ValueError: if a file is empty or of an unknown kind.
    """
    if is_file_source(source):
        if not Path(source).expanduser().is_file() and _is_pattern(source):
            return [existing_file(name) for name in _matches(source)]
        return [existing_file(source)]
    folder = Path(source).expanduser()
    if not folder.is_dir() or hub.is_saved(folder):
        return None
    files = [path for path in sorted(folder.rglob("*")) if _has_suffix(path) and path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    names = [path.relative_to(folder).as_posix() for path in files]
    if not files or any(map(_SPLIT_NAMES.search, names)):
        return None
    return [existing_file(str(path)) for path in files]


def read_blocks(source: Any) -> Iterator[Block]:
    """The rows of a source, in blocks for whoever parses them.

    Args:
        source: a file, possibly compressed, a pattern, a folder, the name of a dataset on the Hub, or a
            ``datasets.Dataset``.

    Raises:
        FileNotFoundError: if there is no such file; names the closest file names beside it.
        ValueError: if nothing of the source can be read.
    """
    files = files_of(source) if isinstance(source, str) else None
    if files is None:
        yield from hub.dataset_blocks(_dataset(source), name_of(source))
        return
    before = 0
    for path in files:
        # A single file is called as its user calls it.
        name = source if len(files) == 1 and Path(source).expanduser() == path else str(path)
        for block in file_blocks(path, name):
            yield block._replace(done=before + block.done)
        before += path.stat().st_size


def read_rows(source: Any, problems: Problems) -> Iterator[Row]:
    """Yield the rows of ``source``; rows that cannot be read go to ``problems`` and are skipped.

    Args:
        source: see :func:`read_blocks`.
        problems: takes what is wrong with single rows.

    Raises:
        FileNotFoundError: see :func:`read_blocks`.
        ValueError: see :func:`read_blocks`.
    """
    for block in read_blocks(source):
        yield from rows_of(block, problems)


def source_size(source: Any) -> int:
    """All that :class:`~lit_lora.data.rows.readers.Block` counts as done at the end: bytes of files, or rows."""
    files = files_of(source) if isinstance(source, str) else None
    return len(_dataset(source)) if files is None else sum(path.stat().st_size for path in files)


def source_digest(source: Any) -> str:
    """SHA-256 of the content of a file, or of several, or of a dataset."""
    files = files_of(source) if isinstance(source, str) else None
    if files is None:
        return hub.dataset_digest(_dataset(source))
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def name_of(source: Any) -> str:
    """What to call a source in messages."""
    return source if isinstance(source, str) else f"the {type(source).__name__} in memory"


def check_source(source: str) -> None:
    """Check that there is what a source names, as far as files tell.

    Raises:
        FileNotFoundError: see :func:`files_of`.
        ValueError: see :func:`files_of`.
    """
    files_of(source)


def existing_file(source: str) -> Path:
    """The path of a readable, non-empty data file.

    Raises:
        FileNotFoundError: if it does not exist; names similar files.
        ValueError: if it is empty or of an unknown kind.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}{_similar(path)}")
    if not _has_suffix(path):
        raise ValueError(
            f"{path} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}, perhaps followed by "
            f"{' or '.join(COMPRESSED)}: rename or convert it"
        )
    if suffix_of(path) == ".parquet" and path.suffix.lower() in COMPRESSED:
        raise ValueError(f"{path}: Parquet is compressed inside: decompress it")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: expected at least one row of data")
    size_gib, memory_gib = size / 2**30, psutil.virtual_memory().total / 2**30
    if suffix_of(path) == ".json" and size_gib > memory_gib:
        raise ValueError(
            f"{path} has {size_gib:,.0f} GiB and this machine {memory_gib:.0f} GiB of memory, into which a .json file "
            "is read: save it as JSON Lines (.jsonl), which is read in pieces"
        )
    if size > (disk := shutil.disk_usage(path).total):
        raise ValueError(
            f"{path} has {size_gib:,.0f} GiB and this machine's disk {disk / 2**30:,.0f} GiB, so most of it is not "
            "there: copy it again"
        )
    return path


def _dataset(source: Any) -> Any:
    if not isinstance(source, str):
        return source
    name = Path(source.partition("@")[0]).expanduser()
    return hub.load(source, "" if name.is_dir() else _similar(Path(source.partition("@")[0])))


def _has_suffix(path: Path) -> bool:
    return suffix_of(path) in SUFFIXES


def _is_pattern(source: str) -> bool:
    return any(mark in source for mark in "*?[")


def _matches(pattern: str) -> list[str]:
    """Files that a pattern matches; of another kind than data they are none that was meant."""
    expanded = str(Path(pattern).expanduser())
    found = sorted(name for name in glob.glob(expanded, recursive=True) if Path(name).is_file())
    if not found:
        raise FileNotFoundError(f"no data file matches {pattern}{_similar(Path(expanded))}")
    return found


def _similar(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f": the folder {path.parent} does not exist ({folder} does)"
    names = [entry.name for entry in folder.iterdir()]
    close = closest(path.name, names, most=3, cutoff=0.5)
    close += [name for name in names if Path(name).stem == path.stem and name not in close]
    if close:
        return f": {did_you_mean(folder / name for name in close)}"
    data = sorted(name for name in names if _has_suffix(Path(name)))[:8]
    return f": {folder} holds {', '.join(data) if data else 'no data files'}"
