"""Problems of rows by kind: a thousand rows with one fault are one line to read."""

from __future__ import annotations

import re

from lit_lora.data.look.report_parts import ProblemKind
from lit_lora.data.rows.rows import Problem, Problems

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
        for problem in problems.first:
            self._add(problem)
        self._count += problems.count
        problems.first, problems.count = [], 0

    @property
    def count(self) -> int:
        """How many problems there are in all."""
        return self._count

    def kinds(self) -> tuple[ProblemKind, ...]:
        """The most frequent first."""
        found = sorted(self._kinds.values(), key=lambda kind: -kind.count)
        rest = self._count - sum(kind.count for kind in found)
        return (*found, *([ProblemKind("of other kinds", rest, {})] if rest else []))

    def _add(self, problem: Problem) -> None:
        key = _OF_THE_ROW.sub("'", problem.message)
        kind = self._kinds.get(key)
        if kind is None and len(self._kinds) == _MOST_KINDS:
            return
        kind = kind or ProblemKind(problem.message, 0, {})
        lines = kind.lines
        if sum(map(len, lines.values())) < _MOST_LINES:
            lines = lines | {problem.file: (*lines.get(problem.file, ()), problem.line)}
        self._kinds[key] = ProblemKind(kind.message, kind.count + 1, lines)
