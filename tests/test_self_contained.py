"""Tests need nothing that does not come with the repository, but for the model that ``make model`` fetches."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tests").rglob("*.py"))


def _leaves_the_repository(path: Path) -> list[int]:
    """Lines that take a parent of the file above the repository's root, or name a folder of some machine."""
    depth = len(path.relative_to(ROOT).parts) - 1
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="parents"), slice=ast.Constant(value=int(levels))):
                outside = levels > depth
            case ast.Constant(value=str(text)) if text.startswith(("/home/", "/root/", "/Users/", "/mnt/")):
                outside = path != Path(__file__).resolve()
            case _:
                outside = False
        found += [node.lineno] if outside else []
    return found


def test_all_files_are_looked_at() -> None:
    assert len(FILES) > 90


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_test_looks_outside_the_repository(path: Path) -> None:
    assert _leaves_the_repository(path) == []
