"""N steps equal k steps, a stop, and N - k steps: bit for bit in weights, moments, schedule, losses and data order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_lora.files.checkpoint import checksum, rng_state
from lit_lora.training import training_state
from lit_lora.training.step_metrics import StepWindow
from tests.tiny import config
from tests.training.resume_project import run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> dict[str, str]:
    """A tiny Llama's config and a data file of ragged examples: seven micro-batches of two an epoch."""
    folder = tmp_path_factory.mktemp("project")
    config("Llama", initializer_range=0.2, vocab_size=260, hidden_size=64).save_pretrained(folder / "base")
    rows = [{"prompt": f"say {i} " * (i % 4 + 1), "completion": f"{i * i} it is " * (i % 3 + 1)} for i in range(14)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"base": f"random:{folder / 'base'}", "train": str(folder / "train.jsonl")}


def ranks(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Run in two processes; what each of them has to say."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(Path(__file__).with_name("resume_project.py")),
        json.dumps({"folder": str(folder), **settings}),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"result.rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_end(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["global_step"] == second["global_step"]
    assert first["losses"] == second["losses"]
    assert first["norms"] == second["norms"]
    assert first["learning_rate"] == second["learning_rate"]
    assert first["validation"] == second["validation"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
    assert checksum(first["moments"]) == checksum(second["moments"])


def assert_close_end(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-4)
    for name, weight in first["weights"].items():
        torch.testing.assert_close(weight, second["weights"][name], rtol=1e-3, atol=1e-5)


SETTINGS = {
    "dropout": {"dropout": 0.2},
    "1 worker": {"data": {"num_workers": 1}},
    "2 workers": {"dropout": 0.2, "data": {"num_workers": 2}},
    "padded": {"data": {"packing": False}},
    "token budget": {"data": {"max_tokens_per_batch": 130}},
    "accumulation": {"dropout": 0.2, "accumulate": 3},
    "validation": {
        "dropout": 0.2,
        "data": {"validation_fraction": 0.3},
        "trainer_options": {"num_sanity_val_steps": -1, "val_check_interval": 2},
    },
    "validation every epoch": {
        "dropout": 0.2,
        "data": {"validation_fraction": 0.5},
        "trainer_options": {"num_sanity_val_steps": -1},
    },
}


@pytest.mark.parametrize("stop_after", [1, 4, 5, 7])
@pytest.mark.parametrize("setting", SETTINGS)
def test_stopped_and_resumed_equals_uninterrupted(project, tmp_path, setting, stop_after):
    """In the middle of an epoch, inside a window, at the epoch's end, in the second epoch."""
    settings = {**project, **SETTINGS[setting]}
    whole = run(folder=str(tmp_path / "whole"), **settings)
    stopped = run(folder=str(tmp_path / "run"), stop_after=stop_after, **settings)
    assert stopped["stopped"]
    assert len(stopped["seen"]) == stop_after
    resumed = run(folder=str(tmp_path / "run"), ckpt_path=stopped["ckpt_path"], seed=99, **settings)
    assert stopped["seen"] + resumed["seen"] == whole["seen"]
    assert_same_end(whole, resumed)


def test_ctrl_c_three_times_changes_nothing(project, tmp_path):
    settings = {**project, "dropout": 0.1, "accumulate": 2}
    whole = run(folder=str(tmp_path / "whole"), **settings)
    ckpt_path, seen = None, []
    for stop_after in (3, 5, 10):
        part = run(
            folder=str(tmp_path / "run"), ckpt_path=ckpt_path, stop_after=stop_after, signum=signal.SIGINT, **settings
        )
        assert part["stopped"]
        ckpt_path, seen = part["ckpt_path"], seen + part["seen"]
    resumed = run(folder=str(tmp_path / "run"), ckpt_path=ckpt_path, **settings)
    assert seen + resumed["seen"] == whole["seen"]
    assert_same_end(whole, resumed)


@pytest.mark.parametrize(("num_ranks", "dropout", "told"), [(2, 0.1, True), (2, 0.0, False), (1, 0.1, False)])
def test_dropout_on_another_number_of_processes_is_said_not_to_be_the_same(num_ranks, dropout, told, recwarn):
    ranks = [{"rng": rng_state(), "window": None}] * num_ranks
    state = {"ranks": ranks, "settings": {"lora": {"lora_dropout": dropout}}}
    training_state.restore(state, SimpleNamespace(global_rank=0, world_size=1), StepWindow(), {})
    assert [str(warning.message)[:42] for warning in recwarn] == ["saved by 2 processes and resumed by 1: eac"] * told


@pytest.mark.ddp
@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_two_processes_equal_one_and_take_over_from_each_other(project, tmp_path, quantized):
    """Seven micro-batches, so that the last step of an epoch has a filler on the second rank; uneven tokens."""
    settings = {**project, "quantized": quantized}
    one = run(folder=str(tmp_path / "one"), accumulate=2, **settings)
    first = run(folder=str(tmp_path / "a"), accumulate=2, stop_after=4, **settings)
    second = ranks(tmp_path / "a", devices=2, ckpt_path=first["ckpt_path"], stop_after=9, **settings)
    assert second[0]["stopped"]
    assert second[0]["global_step"] == 7
    assert_same_end(second[0], {**second[1], "validation": second[0]["validation"]})
    third = run(folder=str(tmp_path / "a"), accumulate=2, ckpt_path=second[0]["ckpt_path"], **settings)
    interleaved = [batch for step in zip(*(rank["seen"] for rank in second), strict=True) for batch in step]
    order = first["seen"] + interleaved + third["seen"]
    assert [batch for batch in order if batch != [-1]] == one["seen"]
    assert_close_end(one, third)


@pytest.mark.ddp
def test_two_processes_resume_bit_for_bit(project, tmp_path):
    settings = {**project, "devices": 2, "dropout": 0.2, "accumulate": 2}
    whole = ranks(tmp_path / "whole", **settings)
    stopped = ranks(tmp_path / "run", stop_after=3, **settings)  # noted in the third batch, acted upon after the fourth
    assert [len(rank["seen"]) for rank in stopped] == [4, 4]
    resumed = ranks(tmp_path / "run", ckpt_path=stopped[0]["ckpt_path"], seed=99, **settings)
    for rank in range(2):
        assert stopped[rank]["seen"] + resumed[rank]["seen"] == whole[rank]["seen"]
        assert_same_end(whole[rank], resumed[rank])
