"""What a cell of a table of tests comes to, and how its values are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """What became of one."""

    status: str
    """equal, different, refused (by us) or PEFT (which fails itself)."""
    why: str = ""
    """Of what is not equal; of what is, what another library makes of it."""


class Differs(Exception):
    """Naming what."""


def same(what: str, got: Tensor, expected: Tensor, *, tolerance: float) -> None:
    """Check values: ``tolerance`` is of the largest one.

    Raises:
        Differs: if they do not have one shape, or are further apart.
    """
    if got.shape != expected.shape:
        raise Differs(f"{what}: {tuple(got.shape)}, not {tuple(expected.shape)}")
    distance = (got - expected).abs().max().item()
    if not distance <= tolerance * max(1.0, expected.abs().max().item()):
        raise Differs(f"{what} by {distance:.2g}")


def same_keys(what: str, got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check names.

    Raises:
        Differs: with some that only one of the two has.
    """
    if got.keys() != expected.keys():
        raise Differs(f"{what}: {sorted(got.keys() ^ expected.keys())[:3]}")
