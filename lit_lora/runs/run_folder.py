"""The folder of a run: a free one that one process claims for itself, or that of the run that is resumed.

Several runs may be started at once with one ``default_root_dir`` (a sweep, an array of jobs), and one run may be
resumed twice. A folder is claimed when it is chosen, by a lock on a file in it, and given back when the run ends. What
ends a process ends its lock, so a killed run leaves nothing that would have to be cleared away.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lit_lora.files.atomic import make_folder
from lit_lora.files.checkpoint import newest_checkpoint

LOCK_NAME = ".lock"
CONFIG_NAME = "config.yaml"
"""What a folder holds that a run has taken."""

OPTION = "trainer.default_root_dir"

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        # A lock of the process (POSIX): workers that it forks do not hold it after it, and it works over NFS.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunFolder:
    """A folder that this process has claimed, until :meth:`release`.

    Args:
        path: of the folder.
        option: the setting that names it, for a message.
    """

    def __init__(self, path: Path, *, option: str = OPTION) -> None:
        self.path = path
        self._option = option
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def claim(self) -> bool:
        """Make the folder if need be, and take its lock; whether no other process holds it.

        Raises:
            OSError: if the folder cannot be made or written to; says what to set.
        """
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        make_folder(self.path, option=self._option)
        while True:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    os.close(descriptor)
                    return False
                warnings.warn(
                    f"{self.path} cannot be locked ({error}): a second run in it would not be seen", stacklevel=2
                )
            if _is_same_file(descriptor, self._lock_path):
                break
            os.close(descriptor)  # the run that had it has ended in between, and removed it
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.truncate(descriptor, 0)
        os.write(descriptor, json.dumps(owner).encode())
        self._descriptor = descriptor
        return True

    @property
    def _lock_path(self) -> Path:
        return self.path / LOCK_NAME

    @property
    def is_taken(self) -> bool:
        """Whether a run has been here."""
        return (self.path / CONFIG_NAME).exists()

    @property
    def owner(self) -> str:
        """Who holds the lock, for a message."""
        try:
            owner = json.loads(self._lock_path.read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):  # being written, or given back, at this moment
            return "another process"

    def release(self) -> None:
        """Give the lock back. A folder that was made for a run that was then refused goes, too."""
        if self._descriptor is None:
            return
        self._lock_path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None
        if self.path in self._made and not self.is_taken:  # loggers make empty folders in it before data are read
            empty = sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True)
            self._made = [*empty, *self._made]
        for path in self._made:
            try:
                path.rmdir()
            except OSError:  # there is something in it
                break


def new_run_folder(folder: str | Path) -> RunFolder:
    """The first free one of ``folder``, ``folder-2``, ``folder-3``, ...: claimed, and without a run in it."""
    number = 1
    while True:
        candidate = RunFolder(Path(folder if number == 1 else f"{folder}-{number}"))
        if not candidate.is_taken and candidate.claim():
            if not candidate.is_taken:  # a run may have come and gone in between
                return candidate
            candidate.release()
        number += 1


def resumed_run_folder(folder: Path) -> RunFolder:
    """The folder of a run that is to be resumed, claimed.

    Raises:
        ValueError: if the run is going on.
    """
    claimed = RunFolder(folder)
    if not claimed.claim():
        raise ValueError(
            f"the run in {folder} is going on ({claimed.owner}): wait for its end or stop it, or start another run"
        )
    return claimed


class ToResume(NamedTuple):
    """A checkpoint to go on from."""

    checkpoint: Path
    folder: Path | None
    """Folder of its run; None if it belongs to none of those that were looked at."""
    skipped: list[str]
    """What was wrong with newer ones."""


def run_folders(root: str | Path) -> list[Path]:
    """Where runs with this ``default_root_dir`` may be: there, and in the numbered folders after it."""
    root = Path(root)
    numbered = [
        path for path in root.parent.glob(f"{glob.escape(root.name)}-*") if path.name[len(root.name) + 1 :].isdigit()
    ]
    return [root, *numbered]


def find_checkpoint(ckpt_path: str, root: str | Path, dirpath: str | None = None) -> ToResume | None:
    """The checkpoint that ``--ckpt_path`` names.

    Args:
        ckpt_path: a file, a folder of them, or "last".
        root: ``default_root_dir``.
        dirpath: where checkpoints go, if not into ``checkpoints`` in the run's folder.

    Returns:
        None for "last" if there is no checkpoint.

    Raises:
        FileNotFoundError: if there is none under that name.
        ValueError: if all that are there are damaged.
    """
    # With a folder of one's own for checkpoints there is no telling which of the numbered runs they are of.
    homes = {Path(dirpath): Path(root)} if dirpath else {path / "checkpoints": path for path in run_folders(root)}
    skipped: list[str] = []
    path: Path | None = Path(ckpt_path)
    if ckpt_path == "last" or Path(ckpt_path).is_dir():
        folders = list(homes) if ckpt_path == "last" else [Path(ckpt_path)]
        path, skipped = newest_checkpoint(*folders)
        if path is None and skipped:
            raise ValueError(
                f"no undamaged checkpoint in {_listed(folders)}: leave out --ckpt_path to start a new run\n  "
                + "\n  ".join(skipped)
            )
        if path is None and ckpt_path != "last":
            raise FileNotFoundError(f"no checkpoint in {ckpt_path}: leave out --ckpt_path to start a new run")
    elif not Path(ckpt_path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give a file, a folder of them, or 'last'")
    if path is None:
        return None
    known = {folder.resolve(): home for folder, home in homes.items()}
    return ToResume(path, known.get(path.parent.resolve()), skipped)


def _listed(folders: Sequence[Path]) -> str:
    return " or ".join(str(folder) for folder in folders if folder.is_dir()) or str(folders[0])


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
