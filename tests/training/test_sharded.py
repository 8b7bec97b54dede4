"""A base that is divided among processes trains as a whole one, and its runs go on under any strategy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_lora import LoRAConfig, QuantizationConfig, StepConfig, estimate_memory
from lit_lora.files.checkpoint import newest_checkpoint
from lit_lora.training.sharded_strategy import NAME
from tests.tiny import config
from tests.training.sharded_project import run

ROOT = Path(__file__).parents[2]
QLORA = {"double_quant": True}

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

USUAL: dict[str, Any] = {"module_options": {"learning_rate": 1e-3}}
"""The rate that LoRA is trained with; rounding grows with it."""

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, 4 micro-batches": {"accumulate": 4, **USUAL},
    "qlora": {"quantization": QLORA},
    "qlora, 4 micro-batches": {"quantization": QLORA, "accumulate": 4, **USUAL},
    "fp4, from files": {"quantization": {"quant_type": "fp4", "double_quant": False}, "stored": True, "max_steps": 4},
    "8 bits, tied ends too": {
        "quantization": {"bits": 8, "embedding_bits": 8}, "tied": True, "stored": True, "max_steps": 4,
    },
    "recomputed, padded, own logits, the head trained": {
        "module_options": {"recompute": True, "chunked_loss": False}, "data": {"packing": False},
        "lora": {"modules_to_save": ["lm_head"]}, "max_steps": 4,
    },
    "DoRA over 4 bits": {"quantization": QLORA, "lora": {"use_dora": True}, "max_steps": 4},
    "new tokens, over 4 bits": {
        "quantization": QLORA, "data": {"new_tokens": ["it is"]}, "stored": True, "max_steps": 4,
    },
    "new tokens and others, tied ends": {
        "data": {"new_tokens": ["it is"]}, "lora": {"trainable_token_indices": [33, 101]}, "tied": True, "max_steps": 4,
    },
    "validated": {
        "data": {"validation_fraction": 0.4}, "max_steps": 4,
        "trainer_options": {"num_sanity_val_steps": -1, "val_check_interval": 2},
    },
}  # fmt: skip
"""What is run on one process with twice as many micro-batches, and on two."""

TRACED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"quantization": QLORA, "lengths": [40, 25], "layers": False}),
    ({"tied": True, "stored": True}, {"quantization": {"bits": 8}, "lengths": [64], "layers": True}),
]
"""Steps whose memory is measured, with what is to be traced."""

CONSTANT: dict[str, Any] = {"module_options": {"lr_schedule": "constant", "warmup_ratio": 0.0}}
"""A rate that does not depend on where a run is to end."""


def started(path: Path, runs: list[dict[str, Any]], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Two processes that run one after the other, and leave what they held and learned in files of that name."""
    command = [sys.executable, str(Path(__file__).with_name("sharded_project.py")), str(path), json.dumps(runs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The output is read until the last process has closed it.
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)


class Project:
    """A tiny Llama, as an architecture and in files, with data of ragged examples; and the runs of two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        for name, tied in (("untied", False), ("tied", True)):
            sizes = {"vocab_size": 260, "hidden_size": 128, "num_hidden_layers": 3, "tie_word_embeddings": tied}
            made = config("Llama", initializer_range=0.2, **sizes)
            AutoModelForCausalLM.from_config(made).save_pretrained(folder / name)
        rows = [{"prompt": f"say {i} " * (i % 4 + 1), "completion": f"{i * i} it is " * (i % 3 + 1)} for i in range(14)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.chain = self.options("chain", CONSTANT, max_steps=5)
        first = run(**self.chain, accumulate=2)["ckpt_path"]
        two = [{**self.options(name, case), "devices": 2, "strategy": NAME} for name, case in CASES.items()]
        steps = [{"strategy": NAME, "max_steps": 10, "ckpt_path": first}, {"strategy": "ddp", "max_steps": 15}]
        self.traced = [{**self.options("traced", case), **step} for case, step in TRACED]
        for settings in self.traced:
            del settings["train"]
        self.ran = self.in_two_processes(
            [*two, *self.traced, *({**self.chain, "devices": 2, **step} for step in steps)]
        )

    def options(self, name: str, case: dict[str, Any], **settings: Any) -> dict[str, Any]:
        base = str(self.folder / ("tied" if case.get("tied") else "untied"))
        others = {key: value for key, value in case.items() if key not in ("tied", "stored")}
        place = {"folder": str(self.folder / name), "train": str(self.folder / "train.jsonl")}
        return {**place, "base": base if case.get("stored") else f"random:{base}", **others, **settings}

    def in_two_processes(self, runs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        path = self.folder / "results"
        done = started(path, runs, timeout_s=400)
        assert done.returncode == 0, done.stderr[-6000:]
        return [torch.load(f"{path}.rank{rank}.pt", weights_only=True) for rank in range(2)]


def on_one_process(case: dict[str, Any]) -> dict[str, Any]:
    """The same, of micro-batches of which each step has twice as many."""
    options = dict(case.get("trainer_options", {}))
    options |= {"val_check_interval": 2 * options["val_check_interval"]} if "val_check_interval" in options else {}
    return {**case, "trainer_options": options, "accumulate": 2 * case.get("accumulate", 1)}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: another number adds up in another order
    yield Project(tmp_path_factory.mktemp("sharded"))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(project, name):
    """Adapters bit for bit with one micro-batch in a step of a process; more are added up in another order.

    Losses to the last digits of the float32 sum that they are.
    """
    case = CASES[name]
    one = run(**project.options(f"{name} on one", on_one_process(case)))
    first, second = (project.ran[rank][list(CASES).index(name)] for rank in range(2))
    assert first["path"] == one["path"]
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=1e-6)
    assert first["validation"] == second["validation"]
    assert [list(entry) for entry in first["validation"]] == [list(entry) for entry in one["validation"]]
    for entry, expected in zip(first["validation"], one["validation"], strict=True):
        assert entry == pytest.approx(expected, rel=1e-6)
    exact = case.get("accumulate", 1) == 1
    for name, expected in one["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        if exact:
            assert torch.equal(first["weights"][name], expected)
        torch.testing.assert_close(first["weights"][name], expected, rtol=0, atol=3e-6)
    assert first["base"] == second["base"] == one["base"]
    assert first["verdict"][1]
    assert max(first["held"], second["held"]) <= 0.55 * one["held"]


def test_a_run_goes_from_one_process_to_two_divided_to_two_whole_and_back(project):
    whole = run(**project.options("whole", CONSTANT, accumulate=2))
    last = project.ran[0][-1]
    assert last["strategy"] == "DDPStrategy"
    end = run(**{**project.chain, "max_steps": 20}, accumulate=2, ckpt_path=last["ckpt_path"])
    assert end["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert all(torch.equal(end["weights"][key], whole["weights"][key]) for key in whole["weights"])
    assert end["base"] == whole["base"]
    assert end["verdict"][1]


@pytest.mark.parametrize("index", range(len(TRACED)))
def test_the_estimate_of_a_rank_is_what_is_alive_on_it(project, index):
    """Within 5 %, for one process's share; and the whole is more."""
    settings = project.traced[index]
    options: dict[str, Any] = {
        "lengths": settings["lengths"],
        "lora": LoRAConfig(r=4),
        "quantization": QuantizationConfig(**settings["quantization"]),
        "step": StepConfig(shared_prefix=False, recompute=settings["layers"]),
    }
    measured = project.ran[0][len(CASES) + index]["peak"]
    estimate = estimate_memory(settings["base"], devices=2, **options)
    assert estimate.peak_bytes == pytest.approx(measured, rel=0.05)
    assert estimate.phases["optimizer"].total < estimate_memory(settings["base"], **options).phases["optimizer"].total


@pytest.mark.parametrize("dies", ["save 1", "validation 0"])
def test_a_killed_rank_ends_the_run_and_leaves_the_newest_checkpoint(project, dies):
    """On every rank, with its reason, in less than a minute after it (the start takes its time, too)."""
    validated = {**CASES["validated"], "max_steps": 40}
    folder = project.folder / dies
    killed = project.options(dies, validated, devices=2, strategy=NAME, dies=dies)
    done = started(folder, [killed], timeout_s=120)
    assert done.returncode != 0
    reasons = "Connection (reset|closed) by peer|terminated with code -9|stops: rank [01] (is gone|has given no)"
    assert re.search(reasons, done.stderr), done.stderr[-3000:]
    newest, problems = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    assert newest.stem == "step=00000002"
    assert problems == []
