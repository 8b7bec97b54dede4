"""Preference pairs through the functions that read and tokenize ordinary rows: both answers of each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from lit_lora.data.chats.formats import Layout, layout_of
from lit_lora.data.chats.pairs import CHOSEN, REJECTED, Pair, is_pair, split
from lit_lora.data.chats.tokenize import Encoded
from lit_lora.data.rows.rows import Problems, Row, shown

Encode = Callable[[list[Row], Problems, Layout], list[Encoded]]


class EncodedPair(NamedTuple):
    """Both answers of a row, each with the prompt."""

    chosen: Encoded
    rejected: Encoded
    num_prompt: int
    """Tokens at the beginning that both have."""


def encode_pairs(
    rows: Sequence[Row],
    problems: Problems,
    encode: Encode,
    *,
    columns: Mapping[str, str] | None,
    ignore: Collection[str],
) -> list[EncodedPair]:
    """Tokenize pairs.

    Args:
        rows: of a source.
        problems: takes rows that are no pair, and those of which an answer cannot be used.
        encode: tokenizes ordinary rows.
        columns: field -> column, as they are set.
        ignore: columns that need not be used.
    """
    pairs: dict[int, Pair] = {}
    for place, row in enumerate(rows):
        if not is_pair(row.fields, "auto", columns):
            problems.add(row.line, f"no pair: expected both {CHOSEN} and {REJECTED}")
            continue
        pairs[place] = split(row.fields, columns)
        for name in pairs[place].unused:
            if row.fields[name] is not None and name not in ignore:
                problems.note(f"column {shown(name)} is not used")
    sides: list[dict[int, Encoded]] = []
    bad: set[int] = set()
    for number, side in enumerate((CHOSEN, REJECTED)):
        by_format: dict[str, list[Row]] = {}
        for place, pair in pairs.items():  # places stand for lines: several rows may be on one
            by_format.setdefault(pair.format, []).append(Row(place, (pair.chosen, pair.rejected)[number]))
        sides.append({})
        for format, given in by_format.items():
            found = Problems(problems.source, most=len(given))
            layout = layout_of(given[0], problems.source, format)
            for encoded in encode(given, found, layout):
                sides[-1][encoded.line] = encoded  # the last one of a row that makes several: it has the answer
            for _, place, message in found.first:
                if place not in bad:
                    bad.add(place)
                    problems.add(rows[place].line, f"{side}: {message}")
            problems.notes += found.notes
    both = [place for place in pairs if all(place in side for side in sides)]
    for place in both:
        if sides[0][place].ids == sides[1][place].ids:
            problems.add(rows[place].line, f"{CHOSEN} and {REJECTED} are the same")
    return [
        _paired(*(side[place]._replace(line=rows[place].line) for side in sides))
        for place in both
        if sides[0][place].ids != sides[1][place].ids
    ]


def _paired(chosen: Encoded, rejected: Encoded) -> EncodedPair:
    """With the prompt: what both begin with, up to the beginning of an answer where there is one in it."""
    shared = next(
        (place for place, (a, b) in enumerate(zip(chosen.ids, rejected.ids, strict=False)) if a != b),
        min(len(chosen.ids), len(rejected.ids)),
    )
    starts = [
        place
        for place in range(1, min(shared, len(chosen.mask) - 1) + 1)
        if chosen.mask[place] and not chosen.mask[place - 1]
    ]
    is_text = starts == [1]
    return EncodedPair(chosen, rejected, shared if is_text or not starts else starts[-1])
