"""Datasets of the ``datasets`` library: on the Hub, saved to disk, in a folder that it can read, or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_lora.data.rows.readers import BLOCK_ROWS, Block, arrow_blocks, arrow_bytes

_MARKS = ("state.json", "dataset_dict.json")
"""One of these is in a folder that ``save_to_disk`` wrote."""


def is_dataset(source: Any) -> bool:
    """Whether it is a ``datasets.Dataset``, found out without importing the library."""
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "datasets.arrow_dataset.Dataset" for kind in type(source).__mro__
    )


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return any((folder / name).is_file() for name in _MARKS)


def load(source: str, similar: str = "") -> Any:
    """A ``datasets.Dataset`` by its name.

    Args:
        source: ``name``, ``name:config``, ``name@split`` or ``name:config@split``; the default split is "train".
        similar: what to say of files with such a name.

    Raises:
        ValueError: if it cannot be loaded.
    """
    import datasets

    name, _, split = source.partition("@")
    config: str | None = None
    if not Path(name).expanduser().is_dir():
        name, _, config = name.partition(":")
    try:
        if is_saved(Path(name).expanduser()):
            return _saved(Path(name).expanduser(), split)
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets raises many unrelated types for "not there"; all become one message
        raise ValueError(
            f"{source!r} is neither a file nor a dataset that can be loaded ({type(error).__name__}: {error}). "
            "Expected a .json, .jsonl, .csv or .parquet file (or .gz or .zst of one), a folder or pattern of them, or "
            f"a Hub dataset as name, name:config, name@split or name:config@split{similar}"
        ) from error


def _saved(folder: Path, split: str) -> Any:
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if (split or "train") not in loaded:
            raise ValueError(f"it has the splits {sorted(loaded)}: name one, as {folder}@{next(iter(loaded))}")
        return loaded[split or "train"]
    if split:
        raise ValueError(f"it is one split, without a name: leave out @{split}")
    return loaded


def dataset_blocks(dataset: Any, name: str) -> Iterator[Block]:
    """The rows of a dataset, numbered from 1."""
    number = 1
    for batch in _batches(dataset):
        yield from arrow_blocks(batch, name, number)
        number += batch.num_rows


def dataset_digest(dataset: Any) -> str:
    """SHA-256 of the content, whatever it is called and wherever it lies."""
    digest = hashlib.sha256()
    for batch in _batches(dataset):
        digest.update(arrow_bytes(batch))
    return digest.hexdigest()


def _batches(dataset: Any) -> Iterator[Any]:
    for table in dataset.with_format("arrow").iter(BLOCK_ROWS):
        yield from table.combine_chunks().to_batches()
