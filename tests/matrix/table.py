"""The tables of ``docs/trainer_settings.md``: ``python -m tests.matrix.table`` writes them anew."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.matrix.settings import ALONE, COLUMNS, REFUSED, REFUSED_PAIRS

PAGE = Path(__file__).parents[2] / "docs" / "trainer_settings.md"
START, END = "<!-- tables of tests/matrix -->\n", "<!-- end of tables -->\n"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {one} | {other} |" for one, other in rows), ""]


def tables() -> str:
    """All of them, as Markdown."""
    pairs = [
        (" with ".join(f"{name} {value}" for name, value in sorted(pair)), why) for pair, why in REFUSED_PAIRS.items()
    ]
    lines = ["## Every pair of these is tried", ""]
    lines += _table(("setting", "values"), ((name, ", ".join(values)) for name, values in COLUMNS.items()))
    lines += ["## Tried one at a time", "", ", ".join(f"`{name}`" for name in ALONE), ""]
    lines += ["## Refused before the model is loaded", ""]
    lines += _table(("setting", "what the error says"), ((case.what, case.why) for case in REFUSED))
    lines += ["## Refused together", ""]
    lines += _table(("settings", "what the error says"), pairs)
    return "\n".join(lines)


def written() -> str:
    """The page's part between its marks."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(START)[0], text.partition(END)[2]
    PAGE.write_text(f"{before}{START}{tables()}{END}{after}", encoding="utf-8")
