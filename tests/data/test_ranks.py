"""Two real processes: they share the data, and a checkpoint moves between one process and two."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ddp_record import fit

from lit_lora.data.batches.sampler import plan_batches
from lit_lora.data.datamodule import SFTDataModule

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


def test_two_processes_equal_one_that_accumulates_and_take_over_from_each_other(tmp_path) -> None:
    """Seven micro-batches are four steps an epoch, the last of them with a filler on the second rank."""
    rows = [{"prompt": f"question {i}", "completion": "answer"} for i in range(7)]
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"train": str(train), "cache_dir": str(tmp_path / "cache")}
    saved = {name: str(tmp_path / name) for name in ("first", "second", "third")}

    first = fit(devices=1, steps=2, save=saved["first"], resume=None, **common)
    options = {"devices": 2, "steps": 7, "save": saved["second"], "resume": saved["first"], **common}
    command = [sys.executable, str(Path(__file__).with_name("ddp_record.py")), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads(Path(f"{saved['second']}.rank{rank}.json").read_text()) for rank in range(2)]
    second = [batch for step in zip(*ranks, strict=True) for batch in step]
    third = fit(devices=1, steps=10, save=saved["third"], resume=saved["second"], **common)

    data = SFTDataModule(common["train"], tokenizer="bytes", batch_size=1, cache_dir=common["cache_dir"])
    data.setup("fit")
    epochs = [plan_batches(data.train_data.lengths, data.batch_settings, epoch) for epoch in range(3)]
    assert first == epochs[0][:4]
    assert second == [*epochs[0][4:], [-1], *epochs[1][:6]]
    assert third == [*epochs[1][6:], *epochs[2][:4]]
