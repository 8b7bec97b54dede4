"""Rows of a table such that every pair of values of two columns stands in some row: a greedy choice, always the same.

Most faults come of one setting or of two together; all pairs take some fifty rows where all combinations take millions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Row = dict[str, str]
Pair = frozenset[tuple[str, str]]


def pairs_of(row: Mapping[str, str]) -> set[Pair]:
    """Those that stand in a row."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def pairwise(columns: Mapping[str, Sequence[str]], allowed: Callable[[Row], bool]) -> list[Row]:
    """Rows with every allowed pair.

    Args:
        columns: name -> values; the first value of each must be allowed beside anything.
        allowed: whether the values of a row, or of a part of one, can stand together.
    """
    missing: dict[Pair, None] = {}  # in order, and without the order that a set of strings has in one process only
    for (first, one), (second, other) in combinations(columns.items(), 2):
        candidates = [{first: a, second: b} for a in one for b in other]
        missing |= {frozenset(row.items()): None for row in candidates if allowed(row)}
    rows = []
    while missing:
        row = dict(sorted(next(iter(missing))))
        for name in sorted(columns.keys() - row.keys(), key=[*columns].index):
            values = [value for value in columns[name] if allowed({**row, name: value})]
            row[name] = max(values, key=lambda value, n=name: len(pairs_of({**row, n: value}) & missing.keys()))  # type: ignore[misc]
        rows.append({name: row[name] for name in columns})
        for pair in pairs_of(row):
            missing.pop(pair, None)
    return rows
