"""What a proving callback found: the one form that reports, tests and other callbacks read."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """The outcome of one check of a run."""

    name: str
    """What was checked."""
    passed: bool | None
    """None where the run gave no answer: too short, interrupted, nothing to check."""
    detail: str
    """The numbers behind the outcome, and on failure what to change."""
