"""Architecture x targets x variant x direction, beside PEFT; docs/conformance.md is written by ``make conformance``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.conformance.conformance_cell import DIRECTIONS, TARGETS, VARIANTS, run_cell
from tests.conformance.conformance_models import ARCHITECTURES
from tests.conformance.conformance_page import Key, page
from tests.table_cell import Cell

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"


@cache
def _cells(architecture: str) -> dict[Key, Cell]:
    return {
        (architecture, targets, variant, direction): run_cell(architecture, targets, variant, direction)
        for targets in TARGETS
        for variant in VARIANTS
        for direction in DIRECTIONS
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_cell_differs_and_what_is_refused_is_what_peft_takes_without_effect(architecture):
    cells = _cells(architecture)
    assert not {key: cell for key, cell in cells.items() if cell.status == "different"}
    assert {cell.why.split(":")[0] for cell in cells.values() if cell.status == "refused"} <= REFUSED
    assert sum(cell.status == "equal" for cell in cells.values()) >= 12


REFUSED = {"bias 'lora_only' has no effect"}
"""Beginnings of our reasons."""


def test_the_page_is_what_was_computed():
    cells = {key: cell for architecture in ARCHITECTURES for key, cell in _cells(architecture).items()}
    assert len(cells) == 756
    assert sum(cell.status == "equal" for cell in cells.values()) > 600
    assert PAGE.read_text(encoding="utf-8") == page(cells), "run make conformance"


@pytest.mark.sweep
def test_the_page_is_written():
    PAGE.write_text(page({key: cell for name in ARCHITECTURES for key, cell in _cells(name).items()}), encoding="utf-8")
