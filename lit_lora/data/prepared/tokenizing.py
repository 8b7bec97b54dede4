"""A source as tokens, block by block, in one process or several, where an earlier start stopped.

In memory is what is being worked on, and a few bytes for each row. Every finished block of a large source is kept in a
file until the whole is written: what a killed run has done, the next one does not do again. The name of such a file
is a digest of the block's content, so whatever happened to the source meanwhile, no block stands for another.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.formats import Layout
from lit_lora.data.prepared.array_file import ArrayFile, Segment, write_arrays
from lit_lora.data.prepared.encoding import CONTENT, EncodedBlock, Encoding, encode_block
from lit_lora.data.prepared.workers import Encode, can_be_sent, encoded_blocks, num_cores
from lit_lora.data.rows.readers import Block, rows_of
from lit_lora.data.rows.rows import Problems, Row
from lit_lora.data.rows.sources import files_of, name_of, read_blocks, source_size
from lit_lora.data.rows.waiting import TokenizingProgress, warn_not_cached

LARGE_BYTES = 16 * 2**20
"""From here on it is worthwhile to start other processes, and to keep what is finished."""

_ROW_BYTES = 1024
"""Of a row of a dataset, about."""


class Tokenized:
    """A source as tokens, in parts.

    Args:
        name: of the source.
    """

    def __init__(self, name: str) -> None:
        self.format = ""
        self.problems = Problems(name)
        self._parts: list[EncodedBlock] = []
        self._files: dict[str, int] = {}

    def add(self, file: str, part: EncodedBlock) -> None:
        """The next block, of a file of the source."""
        self._files.setdefault(file, self.total("kept"))
        self.problems.merge(part.problems)
        self._parts.append(part)

    def total(self, name: str) -> int:
        """Of one of :class:`~lit_lora.data.prepared.encoding.Counts`."""
        return sum(getattr(part.counts, name) for part in self._parts)

    def num_duplicates(self) -> int:
        """Examples that were equal to an earlier one when they were read."""
        content = np.concatenate([part.segment.read(CONTENT) for part in self._parts])
        content.sort()
        return int(np.count_nonzero(content[1:] == content[:-1]))

    def file_starts(self, files: Sequence[str]) -> list[int]:
        """The first example of each file; of one without examples, that of the next."""
        starts, start = [], self.total("kept")
        for file in reversed(files):
            start = self._files.get(file, start)
            starts.append(start)
        return starts[::-1]

    def write(self, file: Any, metadata: Mapping[str, str]) -> None:
        """Put the arrays of a :class:`~lit_lora.data.prepared.dataset.TokenizedDataset` into a file."""
        write_arrays(file, self._segments(), metadata)

    def in_memory(self) -> dict[str, NDArray[Any]]:
        """The same, where there is no file to hold them."""
        segments = self._segments()
        return {name: np.concatenate([segment.read(name) for segment in segments]) for name in segments[0].shapes()}

    def _segments(self) -> list[Segment]:
        weighted = any("weights" in part.segment.shapes() for part in self._parts)
        return [_Examples(part.segment, weighted) for part in self._parts]


class _Examples:
    """Of a block's arrays those that a dataset has; ``weights`` if any block has them."""

    def __init__(self, segment: Segment, weighted: bool) -> None:
        self._segment = segment
        self._weighted = weighted

    def shapes(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        shapes = {name: shape for name, shape in self._segment.shapes().items() if name != CONTENT}
        return shapes | ({"weights": (np.dtype(np.float32), shapes["ids"][1])} if self._weighted else {})

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        if name == "weights" and name not in self._segment.shapes():
            return self._segment.read("mask", start, stop).astype(np.float32)
        return self._segment.read(name, start, stop)


class _Finished:
    """Blocks in files of a folder.

    Args:
        folder: made if needed.
        encoding: of all its blocks.
    """

    def __init__(self, folder: Path, encoding: Encoding) -> None:
        self._folder = folder
        self._encoding = encoding
        self._lock = threading.Lock()
        self._is_writable = True
        self.found: set[int] = set()
        """Blocks that were there, by the ``id`` of their segments."""

    def through(self, encode: Encode, block: Block) -> EncodedBlock:
        """The block from its file, else encoded and put there."""
        path = self._folder / f"{self._encoding.digest(block)}.safetensors"
        if path.is_file():
            try:
                file = ArrayFile(path)
                file.check()
            except (ValueError, OSError):  # of a machine that went down; of a process that was killed it is whole
                pass
            else:
                part = EncodedBlock.of_file(file)
                self.found.add(id(part.segment))
                return part
        part = encode(block)
        with self._lock:  # one after the other: it is the disk that they wait for
            if not self._is_writable:
                return part
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".partial")
                with partial.open("wb") as stream:
                    write_arrays(stream, [part.segment], part.metadata)
                partial.replace(path)
                return part._replace(segment=ArrayFile(path))
            except OSError as error:
                self._is_writable = False
                warn_not_cached(error)
                return part


def tokenized(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    settle: Callable[[Row, str], Layout],
    options: dict[str, Any],
    *,
    limit: int | None,
    folder: Path,
    num_workers: int | None,
) -> Tokenized:
    """Read and tokenize a source.

    Args:
        source: see :func:`lit_lora.data.rows.sources.read_blocks`.
        tokenizer: the model's.
        settle: says what the columns mean, given the first row and the name of its file.
        options: see :class:`~lit_lora.data.prepared.encoding.Encoding`.
        limit: use only the first rows, this many.
        folder: for finished blocks.
        num_workers: processes; None for as many as are worthwhile.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source cannot be read, or no example can be made of it.
    """
    found = Tokenized(name_of(source))
    layout, blocks = _layout(read_blocks(source), name_of(source), settle)
    if layout is None:
        for block in blocks:
            assert not [*rows_of(block, found.problems)]
        return found
    found.format = layout.format
    encoding = Encoding(name_of(source), tokenizer, layout, options)
    size = source_size(source)
    is_large = size * (1 if isinstance(source, str) and files_of(source) else _ROW_BYTES) >= LARGE_BYTES
    if num_workers is None:
        num_workers = num_cores() if is_large else 1
    if num_workers == 1 or not can_be_sent(tokenizer):
        num_workers = 0
    finished = _Finished(folder, encoding) if is_large or num_workers else None
    progress = TokenizingProgress(name_of(source), size)
    through = _at_once if finished is None else finished.through
    for block, part in encoded_blocks(encoding, blocks, num_workers, through):
        was_there = finished is not None and id(part.segment) in finished.found
        left = part.counts.rows if limit is None else limit - progress.num_rows
        if left < part.counts.rows:
            part = encode_block(encoding, block, left)
        found.add(block.file, part)
        (progress.found if was_there else progress.add)(part.counts.rows, block.done)
        if progress.num_rows == limit:
            break
    return found


def _at_once(encode: Encode, block: Block) -> EncodedBlock:
    return encode(block)


def _layout(
    blocks: Iterator[Block], source: str, settle: Callable[[Row, str], Layout]
) -> tuple[Layout | None, Iterator[Block]]:
    """What the first row that can be read settles, and all blocks."""
    seen: list[Block] = []
    for block in blocks:
        seen.append(block)
        if (row := next(rows_of(block, Problems(source)), None)) is not None:
            return settle(row, block.file), itertools.chain(seen, blocks)
    return None, iter(seen)
