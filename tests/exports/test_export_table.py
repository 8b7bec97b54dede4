"""Architecture x target: equal, or refused with the reason; docs/export_table.md is written by ``make conformance``."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest

from lit_lora.interchange.gguf_kinds import KINDS
from tests.exports.export_cell import ROWS, TARGETS, run_row
from tests.exports.export_page import page
from tests.small_adapters import MODELS
from tests.table_cell import Cell

PAGE = Path(__file__).parents[2] / "docs" / "export_table.md"
GGUF = ("gguf", "gguf, adapter", "ollama")
REFUSED: dict[str, tuple[str, ...]] = {
    "StarCoder2": ("vllm",),
    "GPT-2": ("vllm", "mlx"),
    "GPT-NeoX": ("vllm", "mlx"),
    "BLOOM": ("vllm", "mlx"),
    "Qwen3-MoE, experts adapted": ("gguf, adapter", "vllm", "mlx"),
    "gpt-oss": GGUF,
    "OPT": (*GGUF, "mlx"),
    "Falcon": (*GGUF, "vllm", "mlx"),
}
"""Row -> what cannot be written; all else is equal."""


@cache
def _cells(name: str) -> dict[str, Cell]:
    with tempfile.TemporaryDirectory() as folder:
        return run_row(name, Path(folder))


@pytest.mark.parametrize("name", ROWS)
def test_what_is_written_reads_back_equal_and_the_rest_is_refused(name):
    cells = _cells(name)
    assert {target: cell for target, cell in cells.items() if cell.status == "different"} == {}
    assert {target for target, cell in cells.items() if cell.status == "refused"} == set(REFUSED.get(name, ()))
    assert all("merged model" in cell.why for cell in cells.values() if cell.status == "refused")


def test_the_page_is_what_was_computed():
    cells = {name: _cells(name) for name in ROWS}
    assert len(cells) >= 14
    assert len(TARGETS) == 8
    assert PAGE.read_text(encoding="utf-8") == page(cells), "run make conformance"


def test_each_kind_that_is_written_as_gguf_has_a_row():
    assert {kind for kind, _ in MODELS.values()} <= {kind for kind, _ in ROWS.values()}
    assert len(KINDS) == sum(kind in {k for k, _ in MODELS.values()} for kind in dict(ROWS.values()))


@pytest.mark.sweep
def test_the_page_is_written():
    PAGE.write_text(page({name: _cells(name) for name in ROWS}), encoding="utf-8")
