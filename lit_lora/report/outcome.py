"""How a run ended: proved, not proved or not judged, as it is printed and as it stands in ``verdict.json``.

A run is proved when every check that was asked for has judged something and none has failed. What a finished run said
of itself stays: sent again, it says the same.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from lit_lora.callbacks.verdict import Verdict
from lit_lora.files.atomic import atomic_write

FORMAT = 1
FILE_NAME = "verdict.json"
_MOST_BYTES = 16 << 20

_LATER = ("adapter",)
"""Fields that earlier versions did not write."""

EXIT_NOT_PROVED = 3
"""Exit code of a run that came to its end and failed a check."""


@dataclass(frozen=True)
class Outcome:
    """What a run has to say of itself."""

    step: int
    """Optimizer steps of the whole run."""
    verdicts: list[Verdict]
    finished: bool = True
    """Whether training came to its end; a check may end it before."""
    stopped_early: bool = False
    """Whether something else than the Trainer's number of steps and epochs ended it."""
    base: str = ""
    """Hash of the base."""
    adapter: str = ""
    """SHA-256 of the adapter that the run started from; empty for a new one."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed when the run was resumed, each with the step from which it holds."""
    no_step_left: str = ""
    """Why nothing was judged: what left no step to take."""
    losses: list[str] = field(default_factory=list)
    """Lines on training and validation."""
    speed: list[str] = field(default_factory=list)
    """A line on the speed, where there is one."""

    @property
    def result(self) -> Literal["proved", "not proved", "not judged"]:
        """In one word."""
        if any(verdict.passed is False for verdict in self.verdicts):
            return "not proved"
        return "not judged" if self.reasons else "proved"

    @property
    def reasons(self) -> list[str]:
        """What keeps the run from being proved: failed checks, else those that had nothing to judge."""
        if failed := [verdict.name for verdict in self.verdicts if verdict.passed is False]:
            return failed
        if self.no_step_left:
            return [self.no_step_left]
        if not self.step:
            return ["no step was taken"]
        if waiting := [verdict.name for verdict in self.verdicts if verdict.passed is None and verdict.asked]:
            return waiting
        return [] if any(verdict.passed for verdict in self.verdicts) else ["no check is configured"]

    @property
    def exit_code(self) -> int:
        """Of the command line."""
        return EXIT_NOT_PROVED if self.result == "not proved" else 0

    def __str__(self) -> str:
        headline = self.result if self.result == "proved" else f"{self.result.upper()}: {', '.join(self.reasons)}"
        checks = [f"  {verdict.name:<16}{_mark(verdict)}{verdict.detail}" for verdict in self.verdicts]
        changed = [
            f"  {'changed':<16}from step {change['step']} on: {name} was {was}, is {now}"
            for change in self.changes
            for name, (was, now) in change["settings"].items()
        ]
        return "\n".join(["", f"lit_lora: {headline}", *self.losses, *checks, *changed, *self.speed])

    def save(self, folder: Path) -> None:
        """Write ``verdict.json``, whole or not at all."""
        record = {"format": FORMAT, "result": self.result, "reasons": self.reasons, **asdict(self)}
        record["verdicts"] = [verdict._asdict() for verdict in self.verdicts]
        text = json.dumps(record, indent=1) + "\n"
        atomic_write(folder / FILE_NAME, lambda file: file.write(text.encode()))


def read_outcome(folder: str | Path) -> Outcome | None:
    """What the run in this folder has said of itself; None if it has not, or not in a way that can be read."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return None
    try:
        record = json.loads(_text(path))
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}, expected {FORMAT}")
        known = {entry.name: record[entry.name] for entry in fields(Outcome) if entry.name not in _LATER}
        known |= {name: record[name] for name in _LATER if name in record}
        known["verdicts"] = [Verdict(**entry) for entry in record["verdicts"]]
        kinds = {name: get_origin(hint) or hint for name, hint in get_type_hints(Outcome).items()}
        if wrong := [name for name, value in known.items() if not isinstance(value, kinds[name])]:
            raise ValueError(f"{', '.join(wrong)} of another type than a run writes")
        outcome = Outcome(**known)
        str(outcome)  # what cannot be shown, no run has written
        if (record["result"], record["reasons"]) != (outcome.result, outcome.reasons):
            raise ValueError(f"result {record['result']!r} does not follow from its checks")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} cannot be read, so the run is judged again: {error!r:.200}", stacklevel=2)
        return None
    return outcome


def _text(path: Path) -> str:
    """The text of a file of the size that a verdict may have: what lies there may be a pipe, or endless."""
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"expected a file of at most {_MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def _mark(verdict: Verdict) -> str:
    if verdict.passed is None and verdict.asked:
        return "not judged: "
    return "FAILED: " if verdict.passed is False else ""
