"""A folder with a tiny base and a data file, to start runs from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import config


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder: ``base`` for random weights, and ``data.jsonl``."""
    monkeypatch.chdir(tmp_path)
    config("Llama", vocab_size=260, initializer_range=0.2).save_pretrained("base")
    rows = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(40)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
