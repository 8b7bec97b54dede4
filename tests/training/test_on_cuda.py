"""What a run is told of its devices, and what it sets on the way there; all but the kernels can be seen on a CPU."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora
from lit_lora.adapters.layers import lora_layers
from lit_lora.base import base_weight
from lit_lora.base.quantize import quantize_
from lit_lora.base.quantized_forward import compute_in_half_
from lit_lora.training import on_cuda
from tests.tiny import language_model

ROOT = Path(__file__).parents[2]


def _trainer(*, devices: int = 1, accumulate: int = 1, device: str = "cpu", scaler: object = None) -> Any:
    strategy = SimpleNamespace(root_device=torch.device(device), model=None)
    plugin = SimpleNamespace(scaler=scaler)
    return SimpleNamespace(
        world_size=devices, accumulate_grad_batches=accumulate, strategy=strategy, precision_plugin=plugin
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"devices": 1, "accumulate": 4}, ""),
        ({"devices": 8, "device": "cuda"}, "8 GPUs: a step takes 8 micro-batches, 8 times as many as with devices=1"),
        ({"devices": 2, "accumulate": 3}, "2 processes: a step takes 6 micro-batches"),
    ],
)
def test_several_processes_are_said_to_multiply_the_batch(settings, said, caplog):
    with caplog.at_level(logging.INFO):
        on_cuda.say_what_a_step_is(_trainer(**settings))
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


@pytest.mark.parametrize("quantization", [None, QuantizationConfig(block_size=32, embedding_bits=8)])
@pytest.mark.parametrize(
    ("dtype", "scaler", "is_said"),
    [(torch.float16, None, True), (torch.float16, object(), False), (torch.bfloat16, None, False)],
)
def test_a_base_in_float16_without_a_loss_scale_is_told_what_to_set(dtype, scaler, is_said, quantization, caplog):
    model = language_model().to(dtype).requires_grad_(False)
    if quantization is not None:
        quantize_(model, quantization)
    with caplog.at_level(logging.INFO):
        on_cuda.say_what_float16_needs(_trainer(scaler=scaler), model)
    assert ("set precision='16-mixed'" in caplog.text) is is_said


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("trained", [False, True])
def test_buffers_are_sent_around_only_where_one_is_trained(trained, process_group):
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).requires_grad_(trained))
    trainer = _trainer(devices=2)
    trainer.strategy.model = DistributedDataParallel(module)
    on_cuda.let_go_of_buffers(trainer, module)
    assert trainer.strategy.model.broadcast_buffers is trained
    assert trainer.strategy.model.will_sync_module_buffers() is trained


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "None"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="torch has growing segments on Linux")
def test_what_the_user_says_of_the_allocator_stays(given, expected):
    code = (
        "import os; from lit_lora.files.environment import ALLOCATION_VARIABLES as v;"
        "[os.environ.setdefault(*x) for x in v.items()]; print(os.environ.get('PYTORCH_ALLOC_CONF'));"
        + ("import torch; torch.ones(1)" if not given else "")
    )
    clean = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    environment = {**clean, **given, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (expected, "")


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ("float32", torch.bfloat16, torch.bfloat16),
        ("float32", torch.float16, torch.float16),
        ("float32", torch.float32, torch.float32),
        ("float16", torch.bfloat16, torch.float16),
    ],
)
def test_layers_stored_to_compute_in_float32_compute_in_the_half_that_was_asked_for(stored, dtype, expected, caplog):
    model = language_model(hidden_size=64)
    quantize_(model, QuantizationConfig(compute_dtype=stored))
    with caplog.at_level(logging.INFO):
        compute_in_half_(model, dtype)
    layers = [module for module in model.modules() if base_weight.is_4bit(module)]
    assert layers
    assert {base_weight.compute_dtype(layer, dtype) for layer in layers} == {expected}
    assert ("are stored to compute in float32" in caplog.text) == (expected is not getattr(torch, stored))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_few_rows_by_the_layers_own_kernel_give_what_training_computes(bits, monkeypatch):
    model = language_model(hidden_size=64)
    quantize_(model, QuantizationConfig(bits=bits))
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    name, layer = next(iter(lora_layers(model)))
    x = torch.randn(1, 3, layer.in_features)
    calls: list[int] = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
        calls.clear()
        monkeypatch.setattr(base_weight, "has_kernel_for", lambda module, x: True)
        got = layer(x)
    assert calls, name
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_only_a_gpu_takes_a_few_rows_another_way():
    model = language_model(hidden_size=64)
    quantize_(model, QuantizationConfig())
    layer = next(module for module in model.modules() if base_weight.is_4bit(module))
    row = SimpleNamespace(shape=(1, 1, 64), is_cuda=True, numel=lambda: 64)
    rows = SimpleNamespace(shape=(1, 64, 64), is_cuda=True, numel=lambda: 64 * 64)
    with torch.no_grad():
        assert base_weight.has_kernel_for(layer, row)
        assert not base_weight.has_kernel_for(layer, rows)
        assert not base_weight.has_kernel_for(layer, torch.zeros(1, 1, 64))
        assert not base_weight.has_kernel_for(nn.Linear(64, 64), row)
    assert not base_weight.has_kernel_for(layer, row)
