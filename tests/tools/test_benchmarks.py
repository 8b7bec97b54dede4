"""Benchmarks that call the command line still can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import startup


@pytest.mark.real_model
def test_the_start_of_a_run_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({"text": f"Sentence number {n}."}) + "\n" for n in range(4)))
    monkeypatch.setattr(startup, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["startup", "--data", str(data), "--rounds", "1", "--limit", "4"])
    startup.main()
    assert "the same, tokenizing 4 rows" in (tmp_path / "startup.md").read_text()
