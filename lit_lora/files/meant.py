"""What was meant by a name that is not there: the one place that guesses, and the one way to ask."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def closest(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Names that are close to ``name``, best first.

    Args:
        name: as it was given.
        known: what there is.
        most: how many to return.
        cutoff: how alike they have to be, from 0 to 1.
    """
    return difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)


def did_you_mean(found: Iterable[str | Path], *, most: int | None = None) -> str:
    """The question, names in quotes and paths as they are; nothing where nothing was found.

    Args:
        found: what may have been meant.
        most: how many to show.
    """
    words = [str(entry) if isinstance(entry, Path) else repr(entry) for entry in found]
    shown = words[:most]
    more = f" (of {len(words)})" if len(shown) < len(words) else ""
    return f"did you mean {' or '.join(shown)}{more}?" if words else ""
