"""What a line of progress says: in full, or in as many columns as there are."""

from __future__ import annotations

from typing import NamedTuple

from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_FIRST_TO_GO = ("learning rate", "speed", "time left", "loss")
"""What a narrow line does without, one after the other."""

_FEWEST_BAR_COLUMNS = 6


class Progress(NamedTuple):
    """How far a run is. What is not known is None, and not shown."""

    doing: str
    """"step", "validating", ..."""
    done: int
    total: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    speed: str | None = None
    """With its unit."""
    seconds_left: float | None = None


def line(progress: Progress, columns: int | None = None) -> str:
    """The progress in words.

    Args:
        progress: how far the run is.
        columns: that there are; None for as many as it takes.
    """
    parts = {
        "loss": "" if progress.loss is None else f"loss {progress.loss:.4g}",
        "learning rate": "" if progress.learning_rate is None else f"lr {progress.learning_rate:.2e}",
        "speed": progress.speed or "",
        "time left": "" if progress.seconds_left is None else f"{Tqdm.format_interval(progress.seconds_left)} left",
    }
    text = _joined(progress, parts)
    for name in _FIRST_TO_GO:
        if columns is None or len(text) <= columns:
            return text
        del parts[name]
        text = _joined(progress, parts)
    return text[:columns]


def bar_format(progress: Progress, columns: int) -> str:
    """The same as tqdm's ``bar_format``: with a bar after the count, where there is a total and room for one."""
    text = line(progress, columns)
    head, comma, rest = text.partition(", ")
    has_room = len(text) + 1 + _FEWEST_BAR_COLUMNS <= columns
    return f"{head} {{bar}} {rest}".rstrip() if progress.total and has_room else head + comma + rest


def rate(amount_per_s: float, unit: str) -> str:
    """A speed in words."""
    if amount_per_s >= 1e6:
        return f"{amount_per_s / 1e6:,.1f}M {unit}/s"
    return f"{amount_per_s:,.0f} {unit}/s" if amount_per_s >= 10 else f"{amount_per_s:.2g} {unit}/s"


def _joined(progress: Progress, parts: dict[str, str]) -> str:
    of = "" if progress.total is None else f"/{progress.total}"
    return ", ".join(part for part in (f"{progress.doing} {progress.done}{of}", *parts.values()) if part)
