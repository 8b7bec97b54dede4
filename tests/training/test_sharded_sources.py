"""Bases of every kind of file are divided among two processes as they are loaded by one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_lora import QuantizationConfig
from lit_lora.base.load import load_base_model
from lit_lora.training.sharded_strategy import NAME
from tests.tiny import config
from tests.tools.test_fetch import write_tiny_gguf
from tests.training.sharded_project import run
from tests.training.test_sharded import started

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*not adapted"),  # fused experts
]

NF4 = {"double_quant": True}


def _saved(folder: Path, kind: str = "Llama", dtype: torch.dtype = torch.float32, **fields: Any) -> str:
    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    made = AutoModelForCausalLM.from_config(config(kind, **{**sizes, **fields}), dtype=dtype)
    made.save_pretrained(folder, max_shard_size="100KB")
    return str(folder)


def _gguf(folder: Path) -> str:
    folder.mkdir()
    write_tiny_gguf(folder / "tiny.gguf", num_tokens=260)
    return str(folder / "tiny.gguf")


def _quantized(bits: int) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        plain = _saved(folder.with_name(f"{folder.name}-plain"))
        load_base_model(plain, quantization=QuantizationConfig(bits=bits)).save_pretrained(folder)
        return str(folder)

    return make


def _tied_but_stored_apart(folder: Path) -> str:
    """What transformers does not tie then, whatever the config says."""
    _saved(folder, tie_word_embeddings=True)
    (folder / "model.safetensors.index.json").unlink()
    parts = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    for part in parts:
        part.unlink()
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"]) * 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PLAIN = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
ATTENTION = {"lora": {"target_modules": ["q_proj", "v_proj"]}}

SHORT: dict[str, Any] = {"data": {"packing": False}, "module_options": {"chunked_loss": False, "learning_rate": 0.01}}
"""The general way to run a batch, which needs no trial."""

SOURCES: dict[str, tuple[Callable[[Path], str], dict[str, Any], str]] = {
    "GGUF": (_gguf, {}, "it is a GGUF file"),
    "GGUF, quantized": (_gguf, {"quantization": {**NF4, "block_size": 32}}, "it is a GGUF file"),
    "stored in 4 bits": (_quantized(4), {}, "its weights are stored quantized"),
    "stored in 8 bits": (_quantized(8), {}, "its weights are stored quantized"),
    "experts in files of their own": (
        lambda folder: _saved(folder, "Mixtral", **EXPERTS), ATTENTION,
        "its files name other tensors than the model has",
    ),
    "experts, quantized": (
        lambda folder: _saved(folder, "Mixtral", **EXPERTS),
        {**ATTENTION, "quantization": {**NF4, "skip_modules": ["experts"]}},
        "its files name other tensors than the model has",
    ),
    "tied, and stored apart": (_tied_but_stored_apart, {}, "its files hold a tied weight twice"),
    "half precision in the file": (lambda folder: _saved(folder, dtype=torch.bfloat16), {}, ""),
    "half precision in the file, quantized": (
        lambda folder: _saved(folder, dtype=torch.bfloat16), {"quantization": NF4}, "",
    ),
    "transposed weights": (
        lambda folder: _saved(folder, "GPT2", **PLAIN),
        {"lora": {"target_modules": ["c_attn", "c_proj"]}, "quantization": NF4}, "",
    ),
}  # fmt: skip
"""How each is made, what it is run with, and why it is loaded whole; empty for a weight at a time."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The settings of each, what two processes made of it, and all that they said."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes
    folder = tmp_path_factory.mktemp("sources")
    rows = [{"prompt": f"say {i}", "completion": f"{i * i} it is"} for i in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = {
        name: {
            "base": make(folder / f"base{number}"), "folder": str(folder / str(number)), "max_steps": 2,
            "train": str(folder / "train.jsonl"), **SHORT, **options,
        }
        for number, (name, (make, options, _)) in enumerate(SOURCES.items())
    }  # fmt: skip
    done = started(
        folder / "results", [{**each, "devices": 2, "strategy": NAME} for each in runs.values()], timeout_s=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = [torch.load(folder / f"results.rank{rank}.pt", weights_only=True) for rank in range(2)]
    yield runs, dict(zip(runs, zip(*results, strict=True), strict=True)), done.stderr
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SOURCES)
def test_two_processes_train_on_it_as_one(ran, name):
    runs, results, said = ran
    one = run(**runs[name], accumulate=2)
    for result in results[name]:
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert result["base"] == one["base"]
        assert result["verdict"][1]
        for key, expected in one["weights"].items():
            torch.testing.assert_close(result["weights"][key], expected, rtol=0, atol=1e-6)
        assert result["held"] <= 0.7 * one["held"]  # of a layer this small, tables of 4-bit values are a good part
    reason = SOURCES[name][2]
    found = re.findall(rf"^{re.escape(runs[name]['base'])} is loaded whole .*: (.*)$", said, re.MULTILINE)
    assert found == ([reason] if reason else [])
