"""What a setting gives as data: a name, several sources with weights, or rows in memory, in one form."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lora.data.rows.hub import is_dataset
from lit_lora.data.rows.readers import COMPRESSED
from lit_lora.data.rows.rows import Rows, shown
from lit_lora.data.rows.waiting import say
from lit_lora.wording import setting


@dataclass(frozen=True)
class DataSource:
    """One of several sources of data."""

    path: Rows
    """a file, folder, pattern or Hub dataset, as for a single source"""
    weight: float | None = None
    """share of the examples of an epoch: where all sources have weights, relative to their sum; else a fraction below
    1 (0.01 for one replayed example in a hundred), and the sources without weight share the rest by their epochs"""
    epochs: float | None = None
    """how often an epoch of the run goes through this source; 1 if neither this nor weight is given"""
    format: str | None = None
    """as data.format, for this source"""
    columns: dict[str, str] | None = None
    """as data.columns, for this source"""
    name: str | None = None
    """in messages and in metrics (val_loss/NAME); by default the file's name without its ending"""
    limit: int | None = None
    """use only the first rows, this many"""

    def __post_init__(self) -> None:
        if self.weight is not None and self.epochs is not None:
            raise ValueError(f"the source {described(self.path)} has both weight and epochs: give one of them")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} of the source {described(self.path)} must be above 0, got {value}")
        if self.name is not None and not self.name.strip():
            raise ValueError(f"name of the source {described(self.path)} is empty: leave it out, or give one")


if TYPE_CHECKING:
    Given = Any
    """A name, a ``datasets.Dataset``, an iterable of dicts, or a list of sources."""
else:
    Given = str | list[str | DataSource]  # what a command line can give


class RowsInMemory:
    """Rows that an iterable gives, once: written down where they can be read again.

    Args:
        rows: mappings of plain values.
    """

    def __init__(self, rows: Iterable[Any]) -> None:
        self.kind = type(rows).__name__
        self._rows = rows
        self._path: Path | None = None

    def written(self, folder: Path) -> str:
        """The file of JSON lines that they are in; its name is their digest.

        Raises:
            ValueError: for a row that is no mapping, or holds what JSON cannot; names it.
            OSError: if the folder cannot be written to.
        """
        if self._path is None or not self._path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            descriptor, name = tempfile.mkstemp(prefix=".rows.", suffix=".partial", dir=folder)
            try:
                number = 0
                with os.fdopen(descriptor, "wb") as file:
                    for number, line in enumerate(self._lines(), start=1):  # noqa: B007
                        file.write(line)
                        digest.update(line)
                self._path = folder / f"{digest.hexdigest()[:32]}.jsonl"
                os.replace(name, self._path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            say(f"{number:,} rows of {described(self)} are kept as {self._path}")
        return str(self._path)

    def _lines(self) -> Iterator[bytes]:
        for number, row in enumerate(self._rows, start=1):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {number} of {described(self)} is {shown(row)}, expected a dict")
            try:
                yield json.dumps(dict(row)).encode() + b"\n"
            except (TypeError, ValueError) as error:
                raise ValueError(f"row {number} of {described(self)}: {error}: give text, numbers and lists") from None


def described(path: Any) -> str:
    """What to call a source in messages."""
    if isinstance(path, str):
        return path
    return f"the {path.kind if isinstance(path, RowsInMemory) else type(path).__name__} in memory"


def sources_of(given: Any, key: str) -> list[DataSource]:
    """The sources that a setting gives.

    Args:
        given: a name; a dataset or rows in memory; a :class:`DataSource` or its settings; or a list of those.
        key: of the setting.

    Raises:
        ValueError: for something else, or an empty list.
    """
    several = [*given] if isinstance(given, list | tuple) else [given]
    if not several:
        raise ValueError(f"{setting(key)} is empty: expected a file, a dataset or rows")
    if all(map(_is_source, several)):
        return _with_names([_source(one) for one in several])
    if isinstance(given, Iterable) and not isinstance(given, Mapping | bytes):
        return _with_names([DataSource(RowsInMemory(given))])
    raise ValueError(
        f"{setting(key)} is {shown(given)}, expected a file, a dataset, rows, or a list of sources, each with a path"
    )


def _is_source(given: Any) -> bool:
    if isinstance(given, Mapping):
        return "path" in given and given.keys() <= {entry.name for entry in fields(DataSource)}
    return isinstance(given, str | Path | DataSource) or is_dataset(given)


def _source(given: Any) -> DataSource:
    if isinstance(given, Mapping):
        given = DataSource(**given)
    if not isinstance(given, DataSource):
        return DataSource(str(given) if isinstance(given, Path) else given)
    path = given.path
    if isinstance(path, str) or is_dataset(path):
        return given
    return replace(given, path=str(path) if isinstance(path, Path) else RowsInMemory(path))


def _with_names(sources: list[DataSource]) -> list[DataSource]:
    """Each with a name of its own."""
    named: list[DataSource] = []
    taken = [source.name for source in sources if source.name is not None]
    for source in sources:
        if source.name is None:
            name = base = _name(source.path)
            number = 1
            while name in taken:
                number += 1
                name = f"{base}-{number}"
            taken.append(name)
            source = replace(source, name=name)
        elif taken.count(source.name) > 1:
            raise ValueError(f"several sources are called {source.name!r}: give each a name of its own")
        named.append(source)
    return named


def _name(path: Any) -> str:
    if not isinstance(path, str):
        return "memory"
    *folders, name = path.rstrip("/").split("/")
    if "*" in name:
        return folders[-1] if folders and "*" not in folders[-1] else "files"
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name.rpartition(".")[0] or name or "data"
