"""Files that are either the old version or the complete new one, whatever happens while they are written.

The data goes to a temporary file in the target's own folder (a rename is atomic only within one filesystem), is forced
to disk, and then takes the target's name. A full disk or a killed process leaves the earlier file as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

PARTIAL_SUFFIX = ".partial"
"""How the names of temporary files end; whatever lies under such a name is incomplete."""


class FileToWrite(NamedTuple):
    """One file of a set that is replaced together."""

    path: Path
    """The file to make or replace; its folder must exist."""

    write: Callable[[BinaryIO], object]
    """Puts the content into the binary file that it is given."""

    check: Callable[[Path], None] | None = None
    """Reads the finished temporary file and raises if it is not what was meant; the target is then left alone."""


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file to make or replace; its folder must exist.
        write: puts the content into the binary file that it is given.

    Raises:
        OSError: if the folder cannot be written to, or the disk is full. ``path`` is as it was before.
    """
    atomic_write_all([FileToWrite(Path(path), write)])


def atomic_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; its folder is made if it is not there.

    Raises:
        OSError: as :func:`atomic_write`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(text.encode()))


def atomic_write_all(files: Sequence[FileToWrite]) -> None:
    """Write several files, all of them complete and checked before the first takes its name.

    Args:
        files: what to write, in the order in which the files take their names.

    Raises:
        OSError: if a folder cannot be written to, or the disk is full. Every target is as it was before.
    """
    temporaries: list[Path] = []
    current = files[0].path
    try:
        for file in files:
            current = file.path
            temporaries.append(_write_temporary(file))
        for file, temporary in zip(files, temporaries, strict=True):
            if file.check is not None:
                file.check(temporary)
        for file, temporary in zip(files, temporaries, strict=True):
            current = file.path
            os.replace(temporary, file.path)
    except OSError as error:
        _remove(temporaries)
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write {current.name} into the folder {current.parent}: {reason}") from error
    except BaseException:
        _remove(temporaries)
        raise
    for folder in {file.path.parent for file in files}:
        _sync_folder(folder)


def make_folder(folder: str | Path, *, option: str) -> None:
    """Make a folder that can be written to.

    Args:
        folder: may be there already.
        option: the setting that names it, for the message.

    Raises:
        OSError: if it cannot be made or written to; says what to set.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"cannot write into the folder {folder}: {reason}; set {option} to a folder that can be written to"
        raise OSError(error.errno, message) from error


def remove_partial_files(folder: str | Path, *, older_than_s: float = 0.0) -> list[Path]:
    """Delete what killed processes left behind in a folder: temporary files, and temporary folders with their content.

    What cannot be deleted stays; it does no harm.

    Args:
        folder: where to look, not below it. It need not be there.
        older_than_s: seconds since the last change that leave no doubt that nobody is writing any more; 0 where no
            other process may write.

    Returns:
        What was deleted.
    """
    removed = []
    for path in sorted(Path(folder).glob(f".*{PARTIAL_SUFFIX}")):
        try:
            if older_than_s and time.time() - path.stat().st_mtime < older_than_s:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:
            continue
        removed.append(path)
    return removed


def _write_temporary(file: FileToWrite) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=f".{file.path.name}.", suffix=PARTIAL_SUFFIX, dir=file.path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            file.write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; a saved model gets the permissions of any other new file.
        temporary.chmod(0o666 & ~_umask())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Force the rename itself to disk, where the system can open folders (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
