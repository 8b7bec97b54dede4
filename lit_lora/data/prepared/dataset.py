"""The tokenized examples of a source, in a file of the cache, and a choice from those of several.

The cache is addressed by content: its name is the hash of the source, the tokenizer, the settings and this code's
version, so nothing ever needs to be invalidated. A file that is damaged is built again. In memory is what every batch
plan needs, the length of each example; its tokens stay in the file.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.tokenize import Encoded
from lit_lora.data.prepared.array_file import ArrayFile, InMemory, Segment, write_arrays
from lit_lora.files.atomic import atomic_write
from lit_lora.wording import advice

CACHE_VERSION = 2
"""Part of every cache name; to be raised when the same input would be tokenized differently."""


class TokenizedExample(NamedTuple):
    """One example as the collators take it."""

    example_id: int
    """Its place in the dataset; -1 for a filler, which is not trained on."""
    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """True where the token is supervised."""
    weights: NDArray[np.float32] | None = None
    """How much each token counts; None where every supervised one counts once."""
    source: int = 0
    """Which of the dataset's sources it is from."""


@dataclass(frozen=True)
class DatasetStatistics:
    """What became of a source's rows."""

    source: str
    format: str
    num_rows: int
    num_duplicates: int
    num_truncated: int
    num_unsupervised: int
    """Examples dropped because truncation left them without a supervised token."""
    num_bad_rows: int
    bad_rows: list[str] = field(default_factory=list)
    """The first of them, with line numbers."""
    notes: dict[str, int] = field(default_factory=dict)
    """What else was done with rows, and how often."""
    files: list[str] = field(default_factory=list)
    """Of a source of several."""
    file_starts: list[int] = field(default_factory=list)
    """The first example of each of them."""


class TokenizedDataset(Dataset[TokenizedExample]):
    """Token ids of all examples of a source.

    A negative index ``~i`` gives example ``i`` as a filler: shape without supervision, for ranks that have run out of
    data.

    Args:
        arrays: ``ids`` and ``mask`` of all tokens, one example after the other, ``(T,)``, perhaps their ``weights``; of
            each example, ``(N,)``: ``lengths``, ``lines`` (where it comes from), ``supervised`` (how many tokens are),
            ``highest`` (token id) and ``digests``, ``(N, 16)``.
        statistics: what became of the source's rows.
    """

    def __init__(self, arrays: Segment, statistics: DatasetStatistics) -> None:
        self.statistics = statistics
        self._arrays = arrays
        self._has_weights = "weights" in arrays.shapes()
        self.lengths: NDArray[np.int64] = arrays.read("lengths").astype(np.int64)
        """Tokens of each example, ``(N,)``."""
        self.offsets: NDArray[np.int64] = np.concatenate([[0], self.lengths.cumsum()]).astype(np.int64)
        """Where each example starts among all tokens, and the end."""

    @classmethod
    def from_encoded(cls, examples: Sequence[Encoded], statistics: DatasetStatistics) -> TokenizedDataset:
        """Gather tokenized examples; all of them must have a supervised token."""
        return cls(InMemory(arrays_of(examples)), statistics)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenizedExample:
        number = ~index if index < 0 else index
        start, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        ids, mask = (self._arrays.read(name, start, stop) for name in ("ids", "mask"))
        if index < 0:
            return TokenizedExample(-1, ids, np.zeros_like(mask))
        weights = self._arrays.read("weights", start, stop) if self._has_weights else None
        return TokenizedExample(index, ids, mask, weights)

    @property
    def starts(self) -> list[int]:
        """The first example of each source, and the end."""
        return [0, len(self)]

    @property
    def ids(self) -> NDArray[np.int32]:
        """All tokens, ``(T,)``, brought into memory."""
        return self._arrays.read("ids")

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which of them are supervised, likewise."""
        return self._arrays.read("mask")

    @property
    def lines(self) -> NDArray[np.int64]:
        """Where each example comes from in its file, ``(N,)``."""
        return self._arrays.read("lines")

    @property
    def supervised(self) -> NDArray[np.int32]:
        """Supervised tokens of each example, ``(N,)``."""
        return self._arrays.read("supervised")

    @property
    def highest(self) -> NDArray[np.int32]:
        """The highest token id of each example, ``(N,)``."""
        return self._arrays.read("highest")

    @property
    def digests(self) -> NDArray[np.uint8]:
        """Of tokens, and which of them are supervised, for each example, ``(N, 16)``."""
        return self._arrays.read("digests")

    @property
    def num_tokens(self) -> int:
        """Of all examples."""
        return int(self.offsets[-1])

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of all examples."""
        return int(self.supervised.sum(dtype=np.int64))

    def place(self, index: int) -> str:
        """Where an example comes from, as file and line."""
        files = self.statistics.files
        name = files[bisect_right(self.statistics.file_starts, index) - 1] if files else self.statistics.source
        return f"{name}, line {self._arrays.read('lines', index, index + 1)[0]}"

    def digest(self) -> str:
        """SHA-256 of the examples in their order: tokens, and which of them are supervised."""
        return _digest_of(self.digests)

    def select(self, indices: NDArray[np.int64]) -> ChosenExamples:
        """These examples, in this order."""
        return ChosenExamples([(self, indices)])

    def save(self, path: Path) -> None:
        """Write to a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"statistics": json.dumps(asdict(self.statistics))}
        atomic_write(path, lambda file: write_arrays(file, [self._arrays], metadata))

    @classmethod
    def load(cls, path: Path, *, source: str | None = None, files: Sequence[str] = ()) -> TokenizedDataset:
        """Open what :meth:`save` wrote; the file may be removed then.

        Args:
            path: of the file.
            source: what the source is called now; by default as it was.
            files: what its files are called now, if it has several.

        Raises:
            ValueError: if the file is damaged.
        """
        file = ArrayFile(path, keep_open=True)
        file.check()
        try:
            statistics = DatasetStatistics(**json.loads(file.metadata["statistics"]))
            if source is not None:
                statistics = replace(statistics, source=source, files=list(files))
            return cls(file, statistics)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


class ChosenExamples(Dataset[TokenizedExample]):
    """Examples of one or more tokenized sources, in an order; nothing of them is copied.

    Args:
        parts: of each source its examples, and which of them; None for all, in their order.
    """

    def __init__(self, parts: Sequence[tuple[TokenizedDataset, NDArray[np.int64] | None]]) -> None:
        self.parts = list(parts)
        sizes = [len(data) if indices is None else len(indices) for data, indices in parts]
        self.starts: list[int] = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        """The first example of each source, and the end."""
        self.lengths: NDArray[np.int64] = self._gathered("lengths")

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> TokenizedExample:
        number = ~index if index < 0 else index
        source, data, within = self._found(number)
        if index < 0:
            return data[~within]
        return data[within]._replace(example_id=index, source=source)

    @property
    def lines(self) -> NDArray[np.int64]:
        """Where each example comes from, ``(N,)``."""
        return self._gathered("lines")

    @property
    def supervised(self) -> NDArray[np.int32]:
        """Supervised tokens of each example, ``(N,)``."""
        return self._gathered("supervised")

    @property
    def highest(self) -> NDArray[np.int32]:
        """The highest token id of each example, ``(N,)``."""
        return self._gathered("highest")

    @property
    def num_tokens(self) -> int:
        """Of all examples."""
        return int(self.lengths.sum())

    @property
    def num_supervised(self) -> int:
        """Supervised tokens of all examples."""
        return int(self.supervised.sum(dtype=np.int64))

    @property
    def statistics(self) -> DatasetStatistics:
        """Of the first source."""
        return self.parts[0][0].statistics

    def place(self, index: int) -> str:
        """Where an example comes from, as file and line."""
        _, data, within = self._found(index)
        return data.place(within)

    def digest(self) -> str:
        """SHA-256 of the examples in their order: tokens, and which of them are supervised."""
        return _digest_of(self._gathered("digests"))

    def _found(self, number: int) -> tuple[int, TokenizedDataset, int]:
        source = bisect_right(self.starts, number) - 1
        data, indices = self.parts[source]
        within = number - self.starts[source]
        return source, data, within if indices is None else int(indices[within])

    def _gathered(self, name: str) -> NDArray[Any]:
        arrays = [(getattr(data, name), indices) for data, indices in self.parts]
        return np.concatenate([array if indices is None else array[indices] for array, indices in arrays])


Examples = TokenizedDataset | ChosenExamples


def arrays_of(examples: Sequence[Encoded]) -> dict[str, NDArray[Any]]:
    """Tokenized examples as the arrays of a :class:`TokenizedDataset`."""
    lengths = np.array([len(example.ids) for example in examples], dtype=np.int32)
    num_tokens = int(lengths.sum(dtype=np.int64))
    ids = np.fromiter(chain.from_iterable(example.ids for example in examples), np.int32, num_tokens)
    mask = np.fromiter(chain.from_iterable(example.mask for example in examples), np.bool_, num_tokens)
    arrays = {
        "ids": ids,
        "mask": mask,
        "lengths": lengths,
        "lines": np.array([example.line for example in examples], dtype=np.int64),
    }
    if any(example.weights is not None for example in examples):
        weights = (example.mask if example.weights is None else example.weights for example in examples)
        arrays["weights"] = np.fromiter(chain.from_iterable(weights), np.float32, num_tokens)
    starts = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])[:-1]
    digests = bytearray()
    for example, start, length in zip(examples, starts.tolist(), lengths.tolist(), strict=True):
        names = ("ids", "mask") if example.weights is None else ("ids", "mask", "weights")
        content = b"".join(arrays[name][start : start + length].tobytes() for name in names)
        digests += hashlib.blake2b(content, digest_size=16).digest()
    arrays["digests"] = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16)
    # Of no examples there is nothing to reduce.
    arrays["supervised"] = np.add.reduceat(mask, starts, dtype=np.int32) if examples else np.zeros(0, np.int32)
    arrays["highest"] = np.maximum.reduceat(ids, starts) if examples else np.zeros(0, np.int32)
    return arrays


def _digest_of(digests: NDArray[np.uint8]) -> str:
    """SHA-256 of examples in an order, given the digest of each, ``(N, 16)``."""
    digest = hashlib.sha256()
    for start in range(0, len(digests), 2**16):
        digest.update(np.ascontiguousarray(digests[start : start + 2**16]).data)
    return digest.hexdigest()


def lines_of(data: Examples, numbers: Sequence[int]) -> list[int | str]:
    """The lines that examples come from, with the file's name where there are several files; of a filler -1."""
    if (isinstance(data, ChosenExamples) and len(data.parts) > 1) or data.statistics.files:
        return [-1 if number < 0 else data.place(number) for number in numbers]
    lines = data.lines
    return [-1 if number < 0 else int(lines[number]) for number in numbers]


def check_vocabulary(dataset: Examples, vocab_size: int) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        ValueError: if it has not; names the example.
    """
    highest = dataset.highest
    if len(highest) and (found := int(highest.max())) >= vocab_size:
        raise ValueError(
            f"token id {found} ({dataset.place(int(highest.argmax()))}) is outside the model's vocabulary of "
            f"{vocab_size}: the tokenizer is not the model's"
            + advice("; set {} to the model's own", "data.tokenizer", otherwise="")
        )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how the tokenizer maps text to ids."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer.to_str()
    else:
        backend = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    described = {
        "backend": backend,
        "chat_template": tokenizer.chat_template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def cache_path(folder: Path, parts: Mapping[str, Any]) -> Path:
    """The cache file for what ``parts`` describes, plain types only."""
    described = json.dumps({**parts, "version": CACHE_VERSION}, sort_keys=True)
    return folder / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.safetensors"


def load_cached(path: Path, source: str, files: Sequence[str] = ()) -> TokenizedDataset | None:
    """The cached dataset, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        return TokenizedDataset.load(path, source=source, files=files)
    except (ValueError, OSError) as error:
        warnings.warn(f"tokenizing again, because the cache cannot be used: {error}", stacklevel=2)
        return None
