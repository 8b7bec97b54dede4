"""A block of rows becomes tokens: what one worker does at a time, the same in any process."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.formats import Layout, parse_examples
from lit_lora.data.chats.tokenize import encode_examples
from lit_lora.data.prepared.array_file import ArrayFile, InMemory, Segment
from lit_lora.data.prepared.dataset import arrays_of
from lit_lora.data.rows.readers import Block, rows_of
from lit_lora.data.rows.rows import Problem, Problems

CONTENT = "content"
"""Name of the array, beside those of a dataset, that holds 64 bits of a digest of each example as it was read."""


@dataclass(frozen=True)
class Encoding:
    """All that decides what becomes of a block."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    options: dict[str, Any]
    """What :func:`~lit_lora.data.chats.tokenize.encode_examples` is told."""

    def digest(self, block: Block) -> str:
        """Of a block and what it is read as; tokenizer and options are in the name of the folder."""
        described = json.dumps([self.layout, block.file, block.kind, block.first, sorted(block.too_long.items())])
        return hashlib.blake2b(described.encode() + block.payload, digest_size=12).hexdigest()


class Counts(NamedTuple):
    """What became of the rows of a block."""

    rows: int
    examples: int
    """Examples that the tokenizer took, before any is left out."""
    kept: int
    truncated: int
    unsupervised: int


class EncodedBlock(NamedTuple):
    """A block as tokens."""

    segment: Segment
    """The arrays of a :class:`~lit_lora.data.prepared.dataset.TokenizedDataset`, and :data:`CONTENT`."""
    counts: Counts
    problems: Problems

    @property
    def metadata(self) -> dict[str, str]:
        """For a file that keeps it."""
        return {"counts": json.dumps(self.counts), "problems": json.dumps(asdict(self.problems))}

    @classmethod
    def of_file(cls, file: ArrayFile) -> EncodedBlock:
        """What a file keeps."""
        counts, problems = (json.loads(file.metadata[name]) for name in ("counts", "problems"))
        found = Problems(**problems)
        found.first = [Problem(*problem) for problem in found.first]
        found.notes = Counter(found.notes)
        return cls(file, Counts(*counts), found)


def encode_block(encoding: Encoding, block: Block, limit: int | None = None) -> EncodedBlock:
    """Parse and tokenize the rows of a block.

    Args:
        encoding: how.
        block: the rows.
        limit: use only the first rows, this many.

    Raises:
        ValueError: if the tokenizer or its template can have no example.
    """
    problems, refused = Problems(encoding.source), Problems(encoding.source, file=block.file)
    counter = itertools.count()
    rows = (row for row, _ in zip(itertools.islice(rows_of(block, problems), limit), counter, strict=False))
    try:
        items = parse_examples(rows, problems, encoding.layout, ignore=encoding.options["ignore"])
        encoded = encode_examples(encoding.tokenizer, items, refused, **encoding.options) if items else []
    except MemoryError as error:
        raise ValueError(
            f"{block.file}: the rows from {block.first} on do not fit into memory: split them into several"
        ) from error
    kept = [example for example in encoded if any(example.mask)]
    arrays: dict[str, NDArray[Any]] = arrays_of(kept)
    content = b"".join(item.digest[:8] for item in items)
    arrays[CONTENT] = np.frombuffer(content, np.uint64)
    counts = Counts(
        rows=next(counter),
        examples=len(items) - refused.count,
        kept=len(kept),
        truncated=sum(example.truncated for example in encoded),
        unsupervised=len(encoded) - len(kept),
    )
    problems.merge(refused, same_rows=True)
    return EncodedBlock(InMemory(arrays), counts, problems)
