"""Steps with adapted experts make nothing as large as all experts, and few kernels serve all numbers of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_lora import LoRAConfig, inject_lora
from lit_lora.base.quantized_experts import QuantizedExperts
from lit_lora.kernels import products
from tests.tiny import language_model

WAYS = ["grouped_mm", "batched_mm", "eager"]
each_way = pytest.mark.parametrize("way", WAYS)


def _model(way: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    model = language_model("Mixtral", num_local_experts=4, **sizes).to(dtype).train()
    model.set_experts_implementation(way)
    inject_lora(model, LoRAConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    return model


def _step(model: Any, num_tokens: int) -> None:
    ids = torch.arange(num_tokens).mul(7).remainder(model.config.vocab_size - 3)[None] + 3
    model(input_ids=ids, labels=ids).loss.backward()


class Largest(TorchDispatchMode):
    """The most numbers in a storage that an operator returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if QuantizedExperts in types:
            return NotImplemented  # their values are seen when they are made
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(
            isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            for arg in args
        ):
            self.numbers = max(self.numbers, out.untyped_storage().nbytes() // out.itemsize)
        return out


@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_makes_nothing_as_large_as_the_experts(way, dtype):
    model = _model(way, dtype, hidden_size=64, intermediate_size=256)
    with Largest() as largest:
        _step(model, 12)
    of_an_expert = 2 * 256 * 64
    assert 0 < largest.numbers <= of_an_expert
    for layer in (model.model.layers[i].mlp.experts for i in range(len(model.model.layers))):
        layer.routed = layer.base_layer.routed = False
    with Largest() as summed:
        _step(model, 12)
    assert summed.numbers >= 4 * of_an_expert  # so it can fail


@each_way
def test_few_kernels_serve_all_numbers_of_rows(way, monkeypatch):
    shapes: set[tuple[int, ...]] = set()

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.add((len(x), *weight.shape, *weight.stride()))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_SMALL", 1)
    monkeypatch.setattr(products, "_onednn_linear", recorded)
    model = _model(way)
    for num_tokens in range(40, 64, 2):
        _step(model, num_tokens)
    by_weight: dict[tuple[int, ...], set[int]] = {}
    for num_rows, *weight in shapes:
        by_weight.setdefault(tuple(weight), set()).add(num_rows)
    experts = [rows for weight, rows in by_weight.items() if 128 in weight[:2] or 64 in weight[:2]]
    assert experts
    assert max(map(len, experts)) <= 8


def test_numbers_of_rows_are_rounded_up_by_little(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_SMALL", 1)
    x, weight = torch.zeros(1, 4), torch.zeros(3, 4)
    shared = {num: products.shared_num_rows(num, x, weight) for num in range(1, 5000)}
    assert all(num <= got <= max(num + 15, num * 9 / 8) for num, got in shared.items())
    assert len(set(shared.values())) < 60
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert products.shared_num_rows(17, x, weight) == 17


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(5, 22), slice(38, 40), slice(0, 40), slice(39, 40)])
def test_rows_multiplied_with_their_neighbours_are_their_own(rows, dtype, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_SMALL", 1)
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16, dtype=dtype), torch.randn(12, 16, dtype=dtype)
    x[: rows.start], x[rows.stop :] = torch.nan, torch.nan
    got, expected = products.linear_of_rows(x, rows, weight), x[rows].float() @ weight.float().t()
    assert got.shape == expected.shape
    assert (got.float() - expected).abs().max() <= (0.05 if dtype is torch.bfloat16 else 1e-5)
