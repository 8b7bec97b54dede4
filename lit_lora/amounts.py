"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: int | str) -> int:
    """Bytes in "12GB" (10^9), "8GiB" (2^30), "512 MB" or a number.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"expected an amount of memory such as 12GB or 8GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])
