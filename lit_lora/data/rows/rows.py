"""A row of a source, and the report of the rows that cannot be used: all of them, by file and line."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    Rows = Any
    """Where rows are from: a name (``str``), a ``datasets.Dataset``, or an iterable of rows (``dict``)."""
else:
    Rows = str  # what a command line can give

MAX_PROBLEMS_SHOWN = 10
_MAX_NAMES_SHOWN, _MAX_SHOWN = 20, 60


class Row(NamedTuple):
    """One row of a source."""

    line: int
    """Line number in its file, from 1; for Parquet files and datasets the row number."""
    fields: dict[str, Any]


class Problem(NamedTuple):
    """What is wrong with a row."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass
class Problems:
    """What is wrong with a source, collected so that one report names all of it."""

    source: str
    """Name of the file or dataset."""
    first: list[Problem] = field(default_factory=list)
    """The first of them."""
    count: int = 0
    """How many there are in all."""
    notes: Counter[str] = field(default_factory=Counter)
    """What is done with rows that are good but not taken as they are, and how often: a column that is not used, ..."""
    file: str | None = None
    """Which file of the source is being read: put before each line number."""
    most: int = MAX_PROBLEMS_SHOWN
    """How many :attr:`first` holds."""

    def add(self, line: int, message: str) -> None:
        """Note that the row at ``line`` cannot be used, and why."""
        self.count += 1
        if len(self.first) < self.most:
            self.first.append(Problem(self.file or self.source, line, message))

    @property
    def shown(self) -> list[str]:
        """The first problems, ready to print."""
        return [str(problem) for problem in self.first]

    def note(self, message: str, count: int = 1) -> None:
        """Count what is done with a row; the message does not name it."""
        self.notes[message] += count

    def merge(self, other: Problems, *, same_rows: bool = False) -> None:
        """Add those of later rows of the same source, or others of the same rows, in the order of the lines."""
        self.count += other.count
        self.notes += other.notes
        both = self.first + other.first
        if same_rows:
            both.sort(key=lambda problem: problem.line)
        self.first = both[: self.most]

    def __str__(self) -> str:
        rest = self.count - len(self.first)
        return "\n".join([*(f"  {problem}" for problem in self.shown), *([f"  ... and {rest} more"] if rest else [])])


def shown(value: Any) -> str:
    """A value of a file, as long as one can read: a hostile or broken file may hold a name of a gigabyte."""
    text = repr(value[:_MAX_SHOWN]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= _MAX_SHOWN + 2 else f"{text[:_MAX_SHOWN]}..."


def shown_names(names: Sequence[str]) -> str:
    """A list of names, likewise."""
    listed = ", ".join(map(shown, names[:_MAX_NAMES_SHOWN]))
    rest = len(names) - _MAX_NAMES_SHOWN
    return f"[{listed}{f', and {rest:,} more' if rest > 0 else ''}]"
