"""Benchmarks that call the command line still can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import answers, startup


@pytest.mark.real_model
def test_the_start_of_a_run_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps({"text": f"Sentence number {n}."}) + "\n" for n in range(4)))
    monkeypatch.setattr(startup, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["startup", "--data", str(data), "--rounds", "1", "--limit", "4"])
    startup.main()
    assert "the same, tokenizing 4 rows" in (tmp_path / "startup.md").read_text()


@pytest.mark.real_model
@pytest.mark.filterwarnings("ignore")  # of the peers
def test_answers_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data, threads = tmp_path / "few.jsonl", torch.get_num_threads()
    data.write_text("".join(json.dumps({"prompt": "Hello." * n, "completion": "Yes."}) + "\n" for n in range(1, 4)))
    monkeypatch.setattr(answers, "RESULTS", tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["answers", "--data", str(data), "--prompts", "3", "--tokens", "3", "--rounds", "1"]
    )
    answers.main()
    torch.set_num_threads(threads)
    rows = [line for line in (tmp_path / "answers.md").read_text().splitlines() if line.endswith(" of 3 |")]
    assert len(rows) == 4
    assert all(int(row.split("|")[2].split()[0]) > 0 for row in rows)
