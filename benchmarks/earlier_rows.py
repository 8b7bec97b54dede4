"""Rows of a table that is made in parts."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any


def earlier_rows(path: Path, texts: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a CSV file, none where there is no file; cells outside of the columns ``texts`` are JSON or empty."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: value if name in texts or not value else json.loads(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]
