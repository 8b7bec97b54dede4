"""Every sentence of the documentation that promises something stands in a table beside the tests that hold it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.promises.sentences import PROJECT, documents, paragraphs, promising, rows


@cache
def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", documents())
def test_every_promise_has_a_row(document):
    quotes = [row.quote for row in rows() if row.document == document]
    without = [part for part in promising(document) if not any(quote in part for quote in quotes)]
    assert not without, "no row of docs/promises.md quotes\n" + "\n".join(without)


def test_every_row_quotes_what_stands_there():
    gone = [(row.document, row.quote) for row in rows() if row.quote not in paragraphs(row.document)]
    assert not gone


def test_every_row_names_tests_that_are_there():
    for row in rows():
        assert row.tests, row.quote
        for test in row.tests:
            path, name = test.split("::")
            assert name in names_of_tests(PROJECT / "tests" / path), test


def test_a_sentence_without_a_row_is_found(monkeypatch, tmp_path):
    from tests.promises import sentences

    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "It never ends.\n\n| a | b |\n|---|---|\n| bit for bit | no |\n\n```\nalways\n```\n"
    )
    monkeypatch.setattr(sentences, "PROJECT", tmp_path)
    assert promising("README.md") == ["It never ends.", "bit for bit"]
