"""An example as a reader sees it: its text in pieces, each with what it counts in training.

What is not supervised stands in 〔 〕, a weight other than one beside its piece, and ■ after a supervised token that
ends an answer. The marks are there with colours, too: they can be copied and searched.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from transformers import PreTrainedTokenizerBase

MOST_TOKENS = 400
"""Of an example that are shown: from its beginning, and a quarter of them from its end."""

LEGEND = "〔not supervised〕, ■ where an answer ends"
_BOLD, _DIM, _GREEN, _YELLOW, _PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[33m", "\033[0m"


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens that count the same."""

    text: str
    weight: float
    """In the loss; 0 for what is not supervised."""
    is_end: bool = False
    """Whether it is a supervised token that ends an answer."""
    num_left_out: int = 0
    """Tokens that are not shown after it."""


def pieces_of(
    tokenizer: PreTrainedTokenizerBase,
    ids: ArrayLike,
    weights: ArrayLike,
    ends: Collection[int],
    *,
    most_tokens: int = MOST_TOKENS,
) -> tuple[Piece, ...]:
    """Decode an example.

    Args:
        tokenizer: that made the ids.
        ids: tokens, ``(T,)``.
        weights: of each in the loss, ``(T,)``; a mask is as good.
        ends: ids that end an answer.
        most_tokens: cut what is longer in its middle.
    """
    tokens = np.asarray(ids, dtype=np.int64)
    counted = np.asarray(weights, dtype=np.float64)
    is_end = np.isin(tokens, list(ends)) & (counted > 0)
    changes = (np.diff(counted) != 0) | is_end[1:] | is_end[:-1]
    borders = {0, len(tokens), *(np.flatnonzero(changes) + 1).tolist()}
    if len(tokens) > most_tokens:
        head, tail = most_tokens - most_tokens // 4, len(tokens) - most_tokens // 4
        borders = {border for border in borders if border <= head or border >= tail} | {head, tail}
    else:
        head = tail = -1
    found: list[Piece] = []
    edges = sorted(borders)
    for start, stop in itertools.pairwise(edges):
        if (start, stop) == (head, tail):
            found[-1] = Piece(found[-1].text, found[-1].weight, found[-1].is_end, stop - start)
        else:
            text = str(tokenizer.decode(tokens[start:stop].tolist()))
            found.append(Piece(text, float(counted[start]), bool(is_end[start])))
    return tuple(found)


def as_text(pieces: Iterable[Piece], *, colour: bool = False) -> str:
    """One text with marks.

    Args:
        pieces: from :func:`pieces_of`.
        colour: what is not supervised dim, what is green, ends bold and other weights than one yellow.
    """
    parts = []
    for piece in pieces:
        text = visible(piece.text)
        if not piece.weight:
            marked, style = f"〔{text}〕", _DIM
        elif piece.is_end:
            marked, style = f"{text}■", _BOLD + _GREEN
        elif piece.weight != 1:
            marked, style = f"〔×{piece.weight:g} {text}〕", _YELLOW
        else:
            marked, style = text, _GREEN
        parts.append(_styled(marked, style) if colour else marked)
        if piece.num_left_out:
            parts.append(f" ... {piece.num_left_out:,} tokens ... ")
    return "".join(parts)


def visible(text: str) -> str:
    """The text with characters written out that would change a terminal, or the order in which it is read."""
    return "".join(_written_out(c) if unicodedata.category(c) in _CONTROL or c in _BIDI else c for c in text)


_CONTROL = ("Cc", "Cs", "Zl", "Zp")
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def _written_out(character: str) -> str:
    return character if character in "\n\t" else character.encode("unicode_escape").decode("ascii")


def _styled(text: str, style: str) -> str:
    """Each line by itself: pagers forget a colour at the end of a line."""
    return "\n".join(f"{style}{line}{_PLAIN}" if line else "" for line in text.split("\n"))
