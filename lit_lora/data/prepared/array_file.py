"""Arrays in one file, written in pieces and read where they are needed: tokenized data may not fit into memory.

The format is that of safetensors, whose library holds all of a file to write it. Beside the arrays the file has a
checksum of them. It is read, not mapped: a mapped file that something cuts off ends the process without a word, and
what was looked at of it counts as the process's memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

_PIECE_BYTES = 16 * 2**20
_DTYPES = {"I64": np.int64, "U64": np.uint64, "I32": np.int32, "F32": np.float32, "BOOL": np.bool_, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_NO_CHECKSUM = "0" * 10
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)


class Segment(Protocol):
    """A part of every array of a file: in memory, or a file of its own."""

    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Of each array, by name."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows of one of the arrays."""
        ...


class InMemory:
    """Arrays as a segment."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.arrays = arrays

    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Of each array, by name."""
        return {name: (array.dtype, array.shape) for name, array in self.arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows of one of the arrays."""
        return self.arrays[name][start:stop]


class _Place(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    """Of its bytes in the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_arrays(file: BinaryIO, segments: Sequence[Segment], metadata: Mapping[str, str]) -> None:
    """Write the segments' arrays, each of them one after the other.

    Args:
        file: empty; can be read and written anywhere.
        segments: at least one; they have the same arrays, but for their first dimension.
        metadata: of the file.
    """
    places: dict[str, dict[str, Any]] = {}
    first = segments[0].shapes()
    end = 0
    for name in sorted(first, key=lambda name: (-first[name][0].itemsize, name)):
        dtype, shape = first[name]
        rows = sum(segment.shapes()[name][1][0] for segment in segments)
        size = rows * math.prod(shape[1:]) * dtype.itemsize
        places[name] = {"dtype": _NAMES[dtype], "shape": [rows, *shape[1:]], "data_offsets": [end, end + size]}
        end += size

    def write_header(checksum: str) -> None:
        header = json.dumps({"__metadata__": {**metadata, "checksum": checksum}, **places}).encode()
        header += b" " * (-len(header) % 8)
        file.seek(0)
        file.write(len(header).to_bytes(8, "little") + header)

    write_header(_NO_CHECKSUM)
    checksum = 0
    for name in places:
        for segment in segments:
            data = np.ascontiguousarray(segment.read(name)).reshape(-1).view(np.uint8).data
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
    write_header(f"{checksum:010d}")


class ArrayFile:
    """A file of :func:`write_arrays`.

    Args:
        path: of the file.
        keep_open: read from the file that is there now, also when it is removed or replaced.

    Raises:
        ValueError: if it is not whole; whether its content is, :meth:`check` tells.
    """

    def __init__(self, path: Path, *, keep_open: bool = False) -> None:
        self.path = path
        self._places: dict[str, _Place] = {}
        self._descriptor: int | None = None
        if keep_open:
            self._descriptor = os.open(path, _FLAGS)
            weakref.finalize(self, os.close, self._descriptor)
        try:
            with self._opened() as descriptor:
                length = int.from_bytes(_read(descriptor, 8, 0), "little")
                size = os.fstat(descriptor).st_size
                if not 2 <= length <= size - 8:
                    raise ValueError("its header is cut off")
                header = json.loads(bytes(_read(descriptor, length, 8)))
            self.metadata: dict[str, str] = header.pop("__metadata__")
            self._start = end = 8 + length
            for name, entry in header.items():
                place = _Place(np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), end)
                end += place.num_bytes
                if [place.start - self._start, end - self._start] != entry["data_offsets"]:
                    raise ValueError(f"the array {name} is out of place")
                self._places[name] = place
            if end != size:
                raise ValueError(f"it has {size} bytes, expected {end}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the file itself."""
        return {"path": self.path, "keep_open": self._descriptor is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], keep_open=state["keep_open"])  # type: ignore[misc]

    def check(self) -> None:
        """Read all of it and compare the checksum.

        Raises:
            ValueError: if it differs.
        """
        checksum = 0
        place = self._start
        with self._opened() as descriptor:
            while piece := _read(descriptor, _PIECE_BYTES, place):
                checksum = zlib.crc32(piece, checksum)
                place += len(piece)
        if self.metadata.get("checksum") != f"{checksum:010d}":
            raise ValueError(f"{self.path} is damaged: its checksum differs")

    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Of each array, by name."""
        return {name: (place.dtype, place.shape) for name, place in self._places.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows of one of the arrays, in memory.

        Raises:
            OSError: if the file has become shorter.
        """
        dtype, shape, place = self._places[name]
        stop = shape[0] if stop is None else stop
        row = math.prod(shape[1:]) * dtype.itemsize
        size, place = (stop - start) * row, place + start * row
        with self._opened() as descriptor:
            content = _read(descriptor, size, place)
        if len(content) < size:
            raise OSError(f"{self.path} has become shorter since it was opened: tokenize the data again")
        return np.frombuffer(content, dtype).reshape(-1, *shape[1:])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        if self._descriptor is not None:
            yield self._descriptor
            return
        descriptor = os.open(self.path, _FLAGS)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _read(descriptor: int, size: int, place: int) -> bytearray:
    """``size`` bytes, or as many as there are; a single call of the system reads 2 GiB at most."""
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size and (more := _read_some(descriptor, view[done:], place + done)):
        done += more
    view.release()
    del content[done:]
    return content


def _read_some(descriptor: int, view: memoryview, place: int) -> int:
    if hasattr(os, "preadv"):  # without a position that forks would share
        return os.preadv(descriptor, [view], place)
    os.lseek(descriptor, place, os.SEEK_SET)
    some = os.read(descriptor, len(view))
    view[: len(some)] = some
    return len(some)
