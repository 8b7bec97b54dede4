"""A quantized base layer computes one function, whichever way it is called, and stays as it is."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_adapter, load_base_model
from lit_lora.adapters.layers import LoRALinear
from lit_lora.base import base_weight
from lit_lora.base.quantize import dequantize_, quantize_
from lit_lora.callbacks._support.checksum import checksums, frozen_tensors
from tests.tiny import language_model

KINDS = {
    "nf4": QuantizationConfig(),
    "nf4 in bfloat16": QuantizationConfig(compute_dtype="bfloat16"),
    "8 bits": QuantizationConfig(bits=8),
}
each_kind = pytest.mark.parametrize("quantization", KINDS.values(), ids=KINDS)
MODES = {"float32": nullcontext, "bf16-mixed": lambda: torch.autocast("cpu", torch.bfloat16)}


def _inputs() -> torch.Tensor:
    """One row holds a value that LLM.int8 calls an outlier."""
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    x[3, 7] = 20.0
    return x


def _model(quantization: QuantizationConfig) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(64, 96) for name in ("adapted", "plain")})
    model["plain"].load_state_dict(model["adapted"].state_dict())
    quantize_(model, quantization)
    return model


def _ways(model: Any) -> dict[str, Any]:
    """Ways to call the same base weight; B is zero, so that the adapter adds nothing."""
    inject_lora(model, LoRAConfig(r=4, target_modules=["adapted"], lora_dropout=1e-9))
    layer: LoRALinear = model["adapted"]

    def with_adapter(x: torch.Tensor, *, training: bool, fused: bool = True, enabled: bool = True) -> torch.Tensor:
        layer.train(training)
        layer.enabled, layer.has_fast_path = enabled, fused
        return layer(x)

    return {
        "training, with dropout": lambda x: with_adapter(x, training=True),
        "evaluation": lambda x: with_adapter(x, training=False),
        "evaluation, not fused": lambda x: with_adapter(x, training=False, fused=False),
        "training, disabled": lambda x: with_adapter(x, training=True, enabled=False),
        "evaluation, disabled": lambda x: with_adapter(x, training=False, enabled=False),
        "training, without an adapter": lambda x: model["plain"].train()(x),
        "evaluation, without an adapter": lambda x: model["plain"].eval()(x),
    }


@each_kind
@pytest.mark.parametrize("mode", MODES)
def test_every_path_computes_with_the_dequantized_weight(quantization, mode):
    model = _model(quantization)
    plain = copy.deepcopy(model)
    dequantize_(plain)
    compute = torch.bfloat16 if mode == "bf16-mixed" or quantization.compute_dtype == "bfloat16" else torch.float32
    weight, bias = (p.detach().to(compute) for p in (plain["plain"].weight, plain["plain"].bias))
    leaf = _inputs().requires_grad_()
    expected = F.linear(leaf.to(compute), weight, bias)
    expected.float().square().sum().backward()
    # What the fused path adds up once, the others round in between.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if compute is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    dtypes = set()
    for name, way in _ways(model).items():
        x = _inputs().requires_grad_()
        with MODES[mode]():
            out = way(x)
        dtypes.add(out.dtype)
        out.float().square().sum().backward()
        torch.testing.assert_close(out.float(), expected.float(), msg=lambda m, n=name: f"{n}: {m}", **tolerance)
        gradient = {"rtol": 1e-4, "atol": 1e-3} if compute is torch.float32 else {"rtol": 0.05, "atol": 1.0}
        torch.testing.assert_close(x.grad, leaf.grad, msg=lambda m, n=name: f"{n}: {m}", **gradient)
    assert len(dtypes) == 1


@each_kind
def test_a_row_does_not_depend_on_the_others_of_its_batch(quantization):
    model = _model(quantization)
    for name, way in _ways(model).items():
        with torch.no_grad():
            torch.testing.assert_close(way(_inputs()[:1])[0], way(_inputs())[0], rtol=1e-5, atol=1e-5, msg=name)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_path_writes_to_the_base(quantization, dtype):
    model = _model(quantization)
    ways = _ways(model)
    frozen = frozen_tensors(model)
    before = dict(zip(frozen, checksums(frozen.values()), strict=True))
    assert {"plain.bias", "plain.weight.SCB" if quantization.bits == 8 else "plain.weight.absmax"} <= before.keys()
    for way in ways.values():
        way(_inputs().to(dtype))
    frozen = frozen_tensors(model)
    assert dict(zip(frozen, checksums(frozen.values()), strict=True)) == before


@pytest.fixture
def folder(tmp_path):
    language_model("Qwen2", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def _bitsandbytes(folder: str, quantization: QuantizationConfig) -> Any:
    """The model as transformers loads it: bitsandbytes' own forwards."""
    bits = {"load_in_8bit": True} if quantization.bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": getattr(torch, quantization.compute_dtype.replace("auto", "float32")),
    }  # fmt: skip
    config = BitsAndBytesConfig(**bits)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


@pytest.mark.parametrize(
    ("quantization", "tolerance"), [(KINDS["nf4"], 1e-5), (KINDS["8 bits"], 1e-5)], ids=["nf4", "8 bits"]
)
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "down_proj"]])
def test_training_equals_peft_on_layers_of_bitsandbytes(quantization, tolerance, target_modules, folder, tmp_path):
    """On a CPU, where bitsandbytes trains on the dequantized weight too."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(_bitsandbytes(folder, quantization), lora).train()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_base_model(folder, quantization=quantization)
    load_adapter(ours, tmp_path / "adapter", trainable=True)
    ids = torch.arange(3, 24).view(3, 7)
    results = []
    for model in (ours.train(), theirs):
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        gradients = {
            name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        results.append({"logits": logits.detach(), **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        difference = (results[0][name] - expected).abs().max()
        assert difference <= tolerance * max(1, expected.abs().max()), name


@each_kind
def test_a_folder_that_is_stored_quantized_computes_as_it_did(quantization, folder, tmp_path):
    ids = torch.arange(3, 24).view(3, 7)
    made = load_base_model(folder, quantization=quantization).eval()
    made.save_pretrained(tmp_path / "quantized")
    stored = load_base_model(str(tmp_path / "quantized")).eval()
    with torch.no_grad():
        assert torch.equal(stored(ids).logits, made(ids).logits)


@pytest.mark.parametrize("training", [True, False])
def test_scales_that_bitsandbytes_moves_are_the_same_frozen_tensors(training, folder):
    model = _bitsandbytes(folder, KINDS["8 bits"]).train(training).requires_grad_(False)
    name = "model.layers.0.self_attn.q_proj.weight.SCB"
    frozen = frozen_tensors(model)
    before = dict(zip(frozen, checksums(frozen.values()), strict=True))
    layer = model.model.layers[0].self_attn.q_proj
    assert name in before
    assert layer.weight.SCB is not None
    model(input_ids=torch.arange(3, 10)[None])
    assert layer.weight.SCB is None
    frozen = frozen_tensors(model)
    assert dict(zip(frozen, checksums(frozen.values()), strict=True)) == before
    layer.state.SCB[0] *= 2
    assert checksums([frozen_tensors(model)[name]]) != [before[name]]


def test_scales_of_a_rebuilt_4_bit_weight_are_found_on_its_layer(folder):
    model = _bitsandbytes(folder, KINDS["nf4"]).requires_grad_(False)
    layer = model.model.layers[0].self_attn.q_proj
    before = frozen_tensors(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert not hasattr(layer.weight, "quant_state")
    after = frozen_tensors(layer)
    assert checksums(after.values()) == checksums(before.values())
    assert after.keys() == before.keys()
    assert base_weight.is_quantized(layer)
