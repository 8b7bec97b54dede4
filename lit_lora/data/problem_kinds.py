"""Problems of rows by kind: a thousand rows with one fault are one line to read."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lit_lora.data.report_parts import ProblemKind
from lit_lora.data.sources import Problems

_MOST_KINDS, _MOST_LINES = 50, 12
_OF_THE_ROW = re.compile(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\d[\d,.]*")
"""What messages of one kind differ in: quoted values, lists, numbers."""


class ProblemKinds:
    """Sorts the problems of a source, as they come."""

    def __init__(self) -> None:
        self._kinds: dict[str, ProblemKind] = {}
        self._count = 0

    def take(self, problems: Problems) -> None:
        """Take them out of ``problems``; those that it only counted are counted here, too."""
        for line, message in told(problems):
            self._add(line, message)
        self._count += problems.count
        problems.shown, problems.count = [], 0

    @property
    def count(self) -> int:
        """How many problems there are in all."""
        return self._count

    def kinds(self) -> tuple[ProblemKind, ...]:
        """The most frequent first."""
        found = sorted(self._kinds.values(), key=lambda kind: -kind.count)
        rest = self._count - sum(kind.count for kind in found)
        return (*found, *([ProblemKind("of other kinds", rest, ())] if rest else []))

    def _add(self, line: int, message: str) -> None:
        key = _OF_THE_ROW.sub("'", message)
        kind = self._kinds.get(key)
        if kind is None and len(self._kinds) == _MOST_KINDS:
            return
        kind = kind or ProblemKind(message, 0, ())
        lines = kind.lines if len(kind.lines) == _MOST_LINES or line in kind.lines else (*kind.lines, line)
        self._kinds[key] = ProblemKind(kind.message, kind.count + 1, lines)


def told(problems: Problems) -> Iterator[tuple[int, str]]:
    """Line and message of each problem that is shown."""
    for text in problems.shown:
        line, _, message = text.removeprefix(f"{problems.source}:").partition(": ")
        yield int(line), message
