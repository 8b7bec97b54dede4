"""Data and a checkpoint of a stopped run, once for a file of tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.resume_runs import NUM_EXAMPLES, Recorder, SaveAt, Stopped, run


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"question {i}", "completion": "answer " * (1 + i % 4)} for i in range(NUM_EXAMPLES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def checkpoint(data_file, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "stopped.ckpt"
    with pytest.raises(Stopped):
        run(data_file, Recorder(align=True), callbacks=[SaveAt(path, "on_train_batch_end", 2)])
    return path
