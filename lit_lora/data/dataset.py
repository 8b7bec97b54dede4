"""Tokenized examples, flat in memory, and their cache on disk.

The cache is addressed by content: its name is the hash of the source, the tokenizer, the settings and this code's
version, so nothing ever needs to be invalidated. A file that is damaged is built again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lit_lora.data.tokenize import Encoded
from lit_lora.files.atomic import atomic_write
from lit_lora.wording import advice

CACHE_VERSION = 1
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
    """What was done with rows that were not taken as they are, and how often."""


class TokenizedDataset(Dataset[TokenizedExample]):
    """Token ids of all examples in one array, with offsets.

    A negative index ``~i`` gives example ``i`` as a filler: shape without supervision, for ranks that have run out of
    data.

    Args:
        ids: tokens of all examples, one after the other, ``(T,)``.
        mask: which of them are supervised, ``(T,)``.
        offsets: where each example starts, and the end, ``(N + 1,)``.
        lines: where each example comes from in the source, ``(N,)``.
        statistics: what became of the source's rows.
    """

    def __init__(
        self,
        ids: NDArray[np.int32],
        mask: NDArray[np.bool_],
        offsets: NDArray[np.int64],
        lines: NDArray[np.int64],
        statistics: DatasetStatistics,
    ) -> None:
        self.ids = ids
        self.mask = mask
        self.offsets = offsets
        self.lines = lines
        self.statistics = statistics

    @classmethod
    def from_encoded(cls, examples: Sequence[Encoded], statistics: DatasetStatistics) -> TokenizedDataset:
        """Gather tokenized examples; all of them must have a supervised token."""
        lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
        ids = np.fromiter((token for example in examples for token in example.ids), np.int32, int(lengths.sum()))
        mask = np.fromiter((value for example in examples for value in example.mask), np.bool_, int(lengths.sum()))
        lines = np.array([example.line for example in examples], dtype=np.int64)
        return cls(ids, mask, np.concatenate([[0], lengths.cumsum()]).astype(np.int64), lines, statistics)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> TokenizedExample:
        number = ~index if index < 0 else index
        span = slice(self.offsets[number], self.offsets[number + 1])
        if index < 0:
            return TokenizedExample(-1, self.ids[span], np.zeros_like(self.mask[span]))
        return TokenizedExample(index, self.ids[span], self.mask[span])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, ``(N,)``."""
        return np.diff(self.offsets)

    def select(self, indices: NDArray[np.int64]) -> TokenizedDataset:
        """A dataset of these examples, in this order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        tokens = np.repeat(self.offsets[indices], lengths) + within
        return TokenizedDataset(self.ids[tokens], self.mask[tokens], offsets, self.lines[indices], self.statistics)

    def digest(self) -> str:
        """SHA-256 of the examples in their order: tokens, and which of them are supervised."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.ids, self.mask):
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        arrays: dict[str, NDArray[Any]] = {
            "ids": self.ids,
            "mask": self.mask.view(np.uint8),
            "offsets": self.offsets,
            "lines": self.lines,
        }
        metadata = {"statistics": json.dumps(asdict(self.statistics)), "checksum": str(_checksum(arrays))}
        path.parent.mkdir(parents=True, exist_ok=True)
        data = safetensors.save(arrays, metadata)
        atomic_write(path, lambda file: file.write(data))

    @classmethod
    def load(cls, path: Path) -> TokenizedDataset:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            from safetensors import safe_open

            with safe_open(path, "numpy") as file:
                metadata = file.metadata()
                arrays = {name: file.get_tensor(name) for name in ("ids", "mask", "offsets", "lines")}
            statistics = DatasetStatistics(**json.loads(metadata["statistics"]))
            intact = metadata["checksum"] == str(_checksum(arrays))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not intact:
            raise ValueError(f"{path} is damaged: its checksum differs")
        mask = arrays["mask"].view(np.bool_)
        return cls(arrays["ids"], mask, arrays["offsets"], arrays["lines"], statistics)


def check_vocabulary(dataset: TokenizedDataset, vocab_size: int) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        ValueError: if it has not; names the example.
    """
    highest = int(dataset.ids.max(initial=0))
    if highest >= vocab_size:
        example = int(np.searchsorted(dataset.offsets, int(dataset.ids.argmax()), side="right")) - 1
        raise ValueError(
            f"token id {highest} ({dataset.statistics.source}, line {dataset.lines[example]}) is outside the model's "
            f"vocabulary of {vocab_size}: the tokenizer is not the model's"
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


def load_cached(path: Path) -> TokenizedDataset | None:
    """The cached dataset, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        return TokenizedDataset.load(path)
    except (ValueError, OSError) as error:
        warnings.warn(f"tokenizing again, because the cache cannot be used: {error}", stacklevel=2)
        return None


def _checksum(arrays: Mapping[str, NDArray[Any]]) -> int:
    checksum = 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        checksum = zlib.crc32(array.view(np.uint8).data, checksum)
    return checksum
