"""While one thread traces a step, every other computes as ever: nothing that they share is replaced."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from lit_lora.adapters.inject import inject_lora
from lit_lora.base import base_weight
from lit_lora.base.quantize import quantize_
from lit_lora.config import LoRAConfig, QuantizationConfig
from lit_lora.kernels import cuda_stand_ins
from lit_lora.language_model import attention
from lit_lora.language_model.forward import ForwardPath, language_model_loss, placeholder_batch
from lit_lora.memory import traced_step
from lit_lora.memory.estimate import estimate_memory
from lit_lora.memory.storage_tracker import StorageTracker
from lit_lora.memory.valueless import without_values
from tests.memory.test_memory import saved_config
from tests.tiny import language_model


def in_another_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def shared_by_threads() -> list[Any]:
    """All that a trace could replace for the whole process."""
    return [
        AttentionInterface()[attention.IMPLEMENTATION],
        dict(vars(base_weight)),
        dict(vars(attention)),
        dict(vars(torch.nn.functional)),
        dict(vars(nn.Module)),
        logging.getLogger("torch._subclasses.fake_tensor").disabled,
    ]


@pytest.mark.parametrize("quantization", [None, QuantizationConfig(block_size=32)])
def test_another_thread_computes_as_ever_during_a_trace(monkeypatch, tmp_path, quantization):
    """In half precision and on a quantized base, where a trace for CUDA takes other ways."""
    model = language_model().to(torch.bfloat16)
    if quantization is not None:
        quantize_(model, quantization)
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    batch = placeholder_batch([9, 5], packed=True, device="cpu")

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = language_model_loss(model, batch, ForwardPath(packed=True, direct_head=True, reason="")).nll_sum
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    before, shared, during = step(), shared_by_threads(), []
    run_step = traced_step.run_step

    def disturbed(*args: Any, **kwargs: Any) -> None:
        run_step(*args, **kwargs)
        during.append(in_another_thread(step))
        assert shared_by_threads() == shared

    monkeypatch.setattr(traced_step, "run_step", disturbed)
    settings = {"lengths": (64, 20), "lora": LoRAConfig(r=2), "device": "cuda", "quantization": quantization}
    estimate_memory(saved_config(tmp_path), **settings)
    assert len(during) == 1
    assert len(before) == len(during[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(before, during[0], strict=True))


def test_a_tracker_counts_and_names_what_its_own_thread_does():
    watched, other = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 9)

    def compute_elsewhere(*_: Any) -> None:
        in_another_thread(lambda: other(torch.ones(2, 4)))

    watched[0].register_forward_pre_hook(compute_elsewhere)
    tracker = StorageTracker(watched)
    with tracker:
        result = watched(torch.ones(2, 4))
    assert result.shape == (2, 4)
    assert tracker._modules == []
    assert {event.where.partition(" in ")[2] for event in tracker.events if event.num_bytes > 0} <= {"", "0"}
    assert not any(event.num_bytes == 2 * 9 * 4 for event in tracker.events)


def test_only_tensors_of_the_trace_stand_for_cuda():
    real = torch.ones(2)
    with without_values("", as_on_cuda=True):
        made = torch.ones(2)
        assert cuda_stand_ins.is_on_cuda(made)
        assert not cuda_stand_ins.is_on_cuda(real)
        assert not in_another_thread(lambda: cuda_stand_ins.is_on_cuda(torch.ones(2)))
    with without_values(""):
        assert not cuda_stand_ins.is_on_cuda(torch.ones(2))


def test_only_the_log_of_the_tracing_thread_is_silent(caplog):
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with without_values(""):
        log.error("of the trace")
        in_another_thread(lambda: log.error("of another"))
    log.error("afterwards")
    assert [record.message for record in caplog.records] == ["of another", "afterwards"]
