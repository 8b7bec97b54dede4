"""Which runs are told that their steps are recorded, and which not; recording itself needs a GPU (``tests/cuda``)."""

from __future__ import annotations

import copy

import pytest
import torch

from lit_lora import StepConfig
from lit_lora.language_model.cuda_graphs import CudaGraphs, graphs_for, why_not
from lit_lora.language_model.forward import ForwardPath

PATH = ForwardPath(packed=True, direct_head=True, reason="")


@pytest.mark.parametrize(
    ("step", "path", "reason"),
    [
        (StepConfig(), PATH, ""),
        (StepConfig(cuda_graphs=False), PATH, "switched off"),
        (StepConfig(recompute=True), PATH, "memory"),
        (StepConfig(recompute=2), PATH, "memory"),
        (StepConfig(recompute="4GiB"), PATH, "memory"),
        (StepConfig(recompute=True, cuda_graphs=True), PATH, ""),
        (StepConfig(compile_layers=True), PATH, "compiled"),
        (StepConfig(), ForwardPath(packed=False, direct_head=True, reason="x"), "padded"),
        (StepConfig(), ForwardPath(packed=True, direct_head=False, reason="x"), "logits"),
    ],
)
def test_what_is_not_recorded_is_said(step, path, reason):
    found = why_not(step, path)
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_run_that_is_to_repeat_every_bit_is_not_recorded(caplog):
    torch.use_deterministic_algorithms(True)
    try:
        with caplog.at_level("INFO"):
            assert graphs_for(None, StepConfig(), PATH, []) is None
    finally:
        torch.use_deterministic_algorithms(False)
    assert "trainer.deterministic" in caplog.text


def test_a_copy_of_the_module_has_no_graphs():
    assert copy.deepcopy({"graphs": object.__new__(CudaGraphs)}) == {"graphs": None}
