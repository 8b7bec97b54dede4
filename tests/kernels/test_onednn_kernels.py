"""Which of oneDNN's kernels a step in bfloat16 runs, by oneDNN's own account.

On a processor with AMX they are those for AMX, on one with AVX512-BF16 alone those; without either there is nothing
that could be tested. Another kernel (a reference, one that widens its inputs) gives the same numbers many times slower.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
FEATURES = getattr(torch.cpu, "get_capabilities", dict)()
WITH_BFLOAT16 = "avx512_core_bf16|avx512_core_fp16|amx|avx10"
"""In the names of kernels for instructions that multiply it."""
STEP = """
import torch
from lit_lora import LoRAConfig, StepConfig
from lit_lora.build import make_trainable
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.language_model.forward import language_model_loss
from tests.tiny import examples, language_model

model = language_model("Llama", hidden_size=128, intermediate_size=256).to(torch.bfloat16)
path = make_trainable(model, LoRAConfig(r=8), StepConfig()).path
batch = collate_packed([
    TokenizedExample(number, torch.tensor(ids * 8).numpy(), torch.tensor(mask * 8).numpy())
    for number, (ids, mask) in enumerate(examples())
])
print("begins", flush=True)
language_model_loss(model, batch, path).nll_sum.backward()
print("ends", flush=True)
model.eval()
with torch.no_grad():
    model(torch.ones((25, 1), dtype=torch.int64))
print("answers", flush=True)
"""


class Kernel(NamedTuple):
    """A line of oneDNN's account."""

    operation: str
    implementation: str
    types: tuple[str, ...]
    """Of source, weight and result."""


@pytest.fixture(scope="module")
def parts() -> list[list[Kernel]]:
    """What a training step ran, and what a token of 25 rows did."""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for limit in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        environment.pop(limit, None)
    command = [sys.executable, "-W", "ignore", "-c", STEP]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search("begins\n(.*)ends\n(.*)answers\n", done.stdout, re.DOTALL)
    assert found is not None
    return [[*_kernels(part)] for part in found.groups()]


def _kernels(text: str) -> list[Kernel]:
    lines = [line.split(",") for line in text.splitlines() if line.startswith("onednn_verbose,v1,primitive,exec,cpu,")]
    return [Kernel(line[5], line[6], tuple(re.findall(r"(?:src|wei|dst):(\w+):", line[8]))) for line in lines]


@pytest.mark.skipif(not FEATURES.get("avx512_bf16"), reason="no products of bfloat16 here")
def test_products_are_those_of_the_newest_instructions(parts):
    newest = "amx" if FEATURES.get("amx_bf16") else WITH_BFLOAT16
    for part in parts:
        products = [kernel for kernel in part if "bf16" in kernel.types and kernel.operation != "reorder"]
        assert len(products) >= 2 * 7 * 3  # of two layers: each projection, its A and its B
        assert {kernel.operation for kernel in products} <= {"matmul", "inner_product"}
        assert {kernel.types[:2] for kernel in products} == {("bf16", "bf16")}
        used = {kernel.implementation for kernel in products}
        assert any(re.search(newest, name) for name in used)
        assert all(re.search(WITH_BFLOAT16, name) for name in used)  # narrow ones may not fill a tile of AMX


@pytest.mark.skipif(not FEATURES.get("avx512_bf16"), reason="no products of bfloat16 here")
def test_no_weight_is_converted_or_laid_out_anew(parts):
    for part in parts:
        assert [kernel for kernel in part if kernel.operation == "reorder"] == []
