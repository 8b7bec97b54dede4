"""The sentences of the documentation that promise something, and the table that says which test holds each.

A promise is a sentence, or a cell of a table, with one of the words that leave no exception, outside of code.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[2]
TABLE = PROJECT / "docs/promises.md"
GENERATED = (
    "docs/architectures.md", "docs/conformance.md", "docs/export_table.md", "docs/promises.md", "docs/settings.md",
)  # fmt: skip
"""Pages that are made and compared by tests of their own."""

_WORD = re.compile(r"\b(never|always|each|every|bit for bit|bit-identical|bit-exact|refuse[sd]?)\b", re.IGNORECASE)


class Promise(NamedTuple):
    """A row of the table."""

    document: str
    """Path below the project."""
    quote: str
    """A part of a sentence there, as it stands, blanks apart."""
    tests: list[str]
    """``path::name``, below ``tests/``."""


def documents() -> list[str]:
    """The README and the pages of ``docs/``, by path below the project."""
    pages = sorted(str(path.relative_to(PROJECT)) for path in (PROJECT / "docs").rglob("*.md"))
    return ["README.md", *(page for page in pages if page not in GENERATED)]


def promising(document: str) -> list[str]:
    """Sentences and cells of a document that hold a word of promise."""
    return [part for part in _parts(_prose(PROJECT / document)) if _WORD.search(part)]


def paragraphs(document: str) -> str:
    """The prose of a document, with single blanks."""
    return "\n".join(_parts(_prose(PROJECT / document)))


def rows() -> list[Promise]:
    """The rows of the table, by its headings, which are documents."""
    found, document = [], ""
    for line in TABLE.read_text().splitlines():
        if heading := re.fullmatch(r"## `?([\w./]+)`?", line):
            document = heading[1]
        elif document and line.startswith("| ") and not line.startswith(("| sentence", "| ---")):
            quote, tests = (cell.strip() for cell in line.strip("| ").rsplit(" | ", 1))
            found.append(Promise(document, quote, re.findall(r"`([^`]+)`", tests)))
    return found


def _prose(path: Path) -> str:
    """Text without fenced code and without link targets."""
    lines, fenced = [], False
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append(line)
    return re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))


def _parts(text: str) -> list[str]:
    parts = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-|#])", text):
        if paragraph.startswith("|"):
            parts += [cell.strip() for cell in re.split(r"(?<!\\)\|", paragraph) if cell.strip()]
        elif not paragraph.startswith("#"):
            parts += re.split(r"(?<=[.:;!?])\s+", " ".join(paragraph.split()))
    return parts
