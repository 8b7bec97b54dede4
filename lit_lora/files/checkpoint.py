"""Checkpoints that survive kills and can be told apart: atomic, checksummed, and tied to their base model.

What is in one: adapter parameters, optimizer and schedule (Lightning's part), the random state of every rank and the
gradients of an unfinished accumulation window (ours), and who the base is. The base itself is not in it.

Each file carries the SHA-256 of its own content, so that damage is found on reading; a file under a final name was
complete when it took that name. Only tensors and plain types go in: files are read with ``weights_only=True``. A file
can be made to stand for more than it holds (lists in lists twice over, one number as a tensor of gigabytes, zeros that
are compressed): what is larger than its file by far is no checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import random
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from lit_lora.files.atomic import atomic_write

CHECKSUM = "lit_lora_checksum"
SAVED = "lit_lora_saved"
"""Where a checkpoint says when it was saved: ``at_s``, and ``count`` of those in its folder."""

SUFFIX = ".ckpt"
MAX_DEPTH = 100


class DamagedCheckpointError(ValueError):
    """A checkpoint file that cannot be read, or whose content is not what was written."""


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint reading and writing, atomic and with a checksum.

    Lightning's own goes through the system's temporary folder and swallows a PermissionError
    (https://github.com/Lightning-AI/pytorch-lightning/issues/21800).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``path`` whole or not at all.

        Raises:
            OSError: naming the folder, for a full disk or missing permission; an older file is as it was.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {**checkpoint, CHECKSUM: checksum(checkpoint)}
        atomic_write(path, lambda file: _save(checkpoint, file))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint and verify it, without running code from the file.

        Raises:
            DamagedCheckpointError: if the file is incomplete or was changed.
            FileNotFoundError: if there is none.
        """
        return read_checkpoint(path, map_location=map_location or "cpu")

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file, if it is there."""
        Path(path).unlink(missing_ok=True)


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # Where the file cannot be written, torch's archive then complains of how it was left.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_checkpoint(path: str | Path, *, map_location: Any = "cpu") -> dict[str, Any]:
    """See :meth:`AtomicCheckpointIO.load_checkpoint`. Files of other Lightning projects have no checksum to verify."""
    path = Path(path)
    content = _loaded(path, map_location=map_location)
    expected = content.pop(CHECKSUM, None)
    if expected is not None and _checksum_of(content, path) != expected:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: its content does not match its checksum")
    return content


def _loaded(path: Path, **options: Any) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    size = path.stat().st_size
    try:
        _check_parts(path, size)
        content = torch.load(path, weights_only=True, **options)
        _check_extent(content, size)
    except Exception as error:  # torch raises half a dozen types for a broken file
        # The first sentence: what follows advises to run what is in the file.
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise DamagedCheckpointError(f"checkpoint {path} cannot be read: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise DamagedCheckpointError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    return content


def _check_parts(path: Path, size: int) -> None:
    """The parts of a zip have to fit into it, as torch stores them: compressed, 4 MB can hold 4 GB of zeros."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        total = sum(part.file_size for part in archive.infolist())
    if total > size:
        raise ValueError(f"its parts have {total:,} bytes, the file {size:,}")


def _check_extent(content: Any, size: int) -> None:
    """Every value, with all that it stands for, takes room in the file; some may be there twice.

    Raises:
        ValueError: if there is more of it, or it is nested deeper than anything that is saved.
    """
    waiting = [(content, 0)]
    total = 0
    while waiting:
        value, depth = waiting.pop()
        total += value.numel() * value.element_size() if isinstance(value, Tensor) else 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if total > 2**20 + 4 * size:
            raise ValueError(f"what it holds takes far more than the {size:,} bytes of the file")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += [(item, depth + 1) for item in value]


def _checksum_of(content: dict[str, Any], path: Path) -> str:
    try:
        return checksum(content)
    except (ValueError, RuntimeError) as error:  # of tensors without values, or that are no arrays
        raise DamagedCheckpointError(f"checkpoint {path} cannot be read: {error}") from error


class _Saved(NamedTuple):
    """When a checkpoint was saved, as it says itself: what files say changes when they are copied."""

    at_s: float
    """Seconds since 1970; of files of other projects, the time of the last change."""
    number: int
    """How many had been saved into the folder by then, this one included; -1 where it does not say."""
    step: int
    whole: bool
    """Whether training can go on from it; weights alone (``save_weights_only``) are no state of a run."""

    @classmethod
    def read(cls, path: Path) -> _Saved:
        lazily = path.is_file() and zipfile.is_zipfile(path)  # then nothing is read of the tensors
        content = _loaded(path, map_location="cpu", mmap=lazily)
        saved, step = content.get(SAVED), content.get("global_step")
        whole = "optimizer_states" in content
        numbers = (int, float)
        if isinstance(saved, dict) and isinstance(saved.get("at_s"), numbers) and isinstance(saved.get("count"), int):
            return cls(float(saved["at_s"]), saved["count"], step if isinstance(step, int) else -1, whole)
        return cls(path.stat().st_mtime, -1, step if isinstance(step, int) else -1, whole)


def newest_checkpoint(*folders: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in these folders that is complete and undamaged.

    Files with weights alone are passed over. Within a folder the newest is the one before which most had been saved,
    and between folders the one whose newest is newer: both stand in the files, so that a copy is ranked alike.

    Returns:
        Its path (None if there is none), and what was wrong with each newer one. One that cannot be read at all counts
        as newer where its name says so, or nothing is older. What a run that is going on removes meanwhile is no
        damage: the folders are looked at again.
    """
    for _ in range(_LOOKS):
        path, problems, is_moving = _newest_now(folders)
        if path is not None or not is_moving:
            break
    return path, problems


_LOOKS = 20
"""Times to look at folders whose files come and go."""


def _newest_now(folders: Sequence[str | Path]) -> tuple[Path | None, list[str], bool]:
    """As :func:`newest_checkpoint`, and whether one of the files has gone meanwhile."""
    is_moving = False
    unreadable: dict[Path, str] = {}
    ranked: list[tuple[float, list[tuple[_Saved, Path]]]] = []
    for folder in folders:
        found = []
        for path in Path(folder).glob(f"*{SUFFIX}"):
            try:
                saved = _Saved.read(path)
                if saved.whole:
                    found.append((saved, path))
            except (DamagedCheckpointError, OSError) as error:
                if os.path.lexists(path):
                    unreadable[path] = str(error)
                else:
                    is_moving = True
        found.sort(key=lambda entry: (entry[0].number, entry[0].step, entry[0].at_s), reverse=True)
        if found:
            ranked.append((max(saved.at_s for saved, _ in found), found))
    problems = []
    for _, path in (
        entry for _, found in sorted(ranked, key=lambda folder: folder[0], reverse=True) for entry in found
    ):
        try:
            read_checkpoint(path)
        except (DamagedCheckpointError, OSError) as error:
            if os.path.lexists(path):
                problems.append(str(error))
            else:
                is_moving = True
        else:
            newer = [why for other, why in unreadable.items() if other.parent != path.parent or other.name > path.name]
            return path, newer + problems, is_moving
    return None, [*unreadable.values(), *problems], is_moving


def checksum(content: Any) -> str:
    """SHA-256 over a nest of dicts, lists, tensors and plain values, independent of how it is stored."""
    digest = hashlib.sha256()
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes | memoryview]:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        yield f"tensor {data.dtype} {tuple(data.shape)};".encode()
        if data.numel():
            yield data.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, dict):
        yield b"{"
        for key, item in value.items():
            yield repr(key).encode()
            yield from _pieces(item)
        yield b"}"
    elif isinstance(value, (list, tuple)):
        yield b"["
        for item in value:
            yield from _pieces(item)
        yield b"]"
    else:
        yield repr(value).encode()


def rng_state() -> dict[str, Any]:
    """State of every random generator of this process that training may draw from, as tensors and plain types."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            str(numpy_state[0]),
            torch.from_numpy(numpy_state[1].astype(np.int64)),
            *(float(part) for part in numpy_state[2:]),
        ],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), int(position), int(has_gauss), cached))
