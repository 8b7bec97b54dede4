"""Correctness on a device, on a small model with random weights; each check says its bound and what it found.

Gradients are held against a float64 model on the CPU that takes none of the shortcuts: padded rows, plain LoRA layers,
the model's own logits. It has the very weights of the model under test, those rounded to bfloat16 too, so what differs
is rounding in the step and nothing else. transformers computes norms and rotary positions in float32 in every type,
the float64 model's included, which sets the floor of the float32 check.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from benchmarks.cuda.data import examples
from benchmarks.cuda.worker import ROOT, Row
from lit_lora import LoRAConfig, inject_lora, load_base_model
from lit_lora.adapters.layers import LoRALinear, lora_layers
from lit_lora.base import base_weight
from lit_lora.base.quantize import quantized_layer
from lit_lora.base.quantized_forward import prepare_base_layer
from lit_lora.config import QuantizationConfig
from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.language_model.forward import ForwardPath, language_model_loss
from lit_lora.language_model.trial import choose_path
from lit_lora.rewrites.gated_mlp import recompute_gated_mlps

FLOAT32_BOUND = 1e-5
"""Largest relative error of an adapter's gradient: |got - exact| / |exact|, Euclidean norms of each matrix."""
BFLOAT16_FACTOR = 1.25
"""The same in bfloat16, as a multiple of what the plain step (no shortcut, same types, same device) loses to rounding.

How much bfloat16's rounding grows on its way is a matter of the weights, so no number fits every model: 2% to 5% for
this one on a CPU, with the shortcuts 0.94 to 1.06 times that (nine batches and scales of weights)."""
SHAPES = [(512, 1024), (96, 320), (1408, 512)]
"""Of weights to decode, (out_features, in_features)."""


def gpu_tests(settings: Row) -> Row:
    """The tests that are marked ``gpu``; one that is skipped has shown nothing and counts as failed.

    Only the files that hold such tests are collected: others may import what a machine with a GPU does not have.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-m", "gpu", "-v", "-ra", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(max(1, min((os.cpu_count() or 1) // 2, 6))), "--dist", "loadfile", "-p", "no:benchmark"]
    command = [sys.executable, "-m", "pytest", *options, *files]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)  # tells how far they came if they are stopped
            lines.append(line.rstrip())
    last = lines[-1] if lines else "no output"
    passed = process.returncode == 0 and " passed" in last and " skipped" not in last
    unmet = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    return {
        "status": _verdict(passed),
        "found": last.strip("= "),
        "bound": "all pass",
        "detail": "; ".join(unmet)[:600],
    }


def gradients(settings: Row) -> Row:
    """The fast paths together, packed, against float64 on the CPU."""
    dtype, device = settings["dtype"], settings["device"]
    model = _model(settings, dtype)
    exact = _plain_gradients(model, settings, "float64", "cpu")
    bound, how = FLOAT32_BOUND, ""
    if dtype != "float32":
        plain = _worst_error(_plain_gradients(model, settings, dtype, device), exact)
        bound, how = BFLOAT16_FACTOR * plain, f"; the plain step's is {plain:.2e}"
    got, path = _fast_gradients(model, settings)
    error = _worst_error(got, exact)
    return {
        "status": _verdict(error <= bound),
        "found": f"{error:.2e}",
        "bound": f"{bound:.2e}",
        "detail": f"largest relative error of {len(exact) - 1} adapter gradients and the loss; {path}{how}",
    }


def packed_equals_unpacked(settings: Row) -> Row:
    """A packed batch against the same batch padded: on CUDA in bfloat16, by variable-length attention.

    In float32 the two must agree; in bfloat16 packing may be no further from float64 than padding is, with the factor.
    """
    on_cuda = settings["device"] == "cuda"
    dtype = "bfloat16" if on_cuda else "float32"
    calls = 0
    kernel = varlen.varlen_attn

    @functools.wraps(kernel)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return kernel(*args, **kwargs)

    model = _model(settings, dtype)
    exact = _plain_gradients(model, settings, "float64", "cpu")
    varlen.varlen_attn = counted
    try:
        packed, _ = _fast_gradients(model, settings)
    finally:
        varlen.varlen_attn = kernel
    how = f"variable-length attention, {calls} calls" if on_cuda else "a CPU's kernel: variable-length needs CUDA"
    assert (calls > 0) == on_cuda, f"{calls} calls of variable-length attention on {settings['device']}"
    model.set_attn_implementation("sdpa")
    padded = _gradients(
        model, _to(collate_padded(examples(settings)), settings["device"]), ForwardPath(False, True, "")
    )
    difference = _worst_error(packed, padded)
    error, bound = difference, 2 * FLOAT32_BOUND
    if on_cuda:
        error, bound = _worst_error(packed, exact), BFLOAT16_FACTOR * _worst_error(padded, exact)
    return {
        "status": _verdict(error <= bound),
        "found": f"{error:.2e}",
        "bound": f"{bound:.2e}",
        "detail": f"gradients and loss in {dtype}, {difference:.2e} apart; {how}",
    }


def nf4_decode(settings: Row) -> Row:
    """NF4 with double quantization, decoded on the device by the training code, against decoding on the CPU."""
    functional = base_weight.bitsandbytes().functional
    num_wrong = num_weights = 0
    for seed, (num_out, num_in) in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(seed)
            linear = torch.nn.Linear(num_in, num_out, bias=False, dtype=dtype)
            with torch.no_grad():
                linear.weight.normal_(std=0.02, generator=generator)
            layer: Any = quantized_layer("layer", linear.to(settings["device"]), QuantizationConfig())
            prepare_base_layer("layer", layer)
            codes, state = layer.weight.data, layer.weight.quant_state
            got = base_weight.read_weight(layer).cpu()
            own = functional.dequantize_4bit(codes, state).cpu()
            state_on_cpu = copy.deepcopy(state)
            state_on_cpu.to("cpu")
            on_cpu = functional.dequantize_4bit(codes.cpu(), state_on_cpu)
            table = base_weight.look_up_4bit(codes.cpu(), state_on_cpu)
            num_wrong += sum(int((got != other).sum()) for other in (own, on_cpu, table))
            num_weights += got.numel()
    return {
        "status": _verdict(num_wrong == 0),
        "found": f"{num_wrong} differ",
        "bound": "0",
        "detail": f"{num_weights} weights; training code, bitsandbytes on the device and on the CPU, and the table",
    }


def _model(settings: Row, dtype: str) -> Any:
    """Base and adapters, both random: with B at zero no error in A's gradient would show."""
    torch.manual_seed(0)
    model: Any = load_base_model(settings["base"], dtype=dtype, device=settings["device"])
    inject_lora(model, LoRAConfig(r=8, lora_alpha=16, init_lora_weights=False))
    return model


def _fast_gradients(model: Any, settings: Row) -> tuple[dict[str, Tensor], ForwardPath]:
    recompute_gated_mlps(model)
    path = choose_path(model)
    if not (path.packed and path.direct_head):
        raise RuntimeError(f"the model takes no fast path: {path}")
    return _gradients(model, _to(collate_packed(examples(settings)), settings["device"]), path), path


def _plain_gradients(model: Any, settings: Row, dtype: str, device: str) -> dict[str, Tensor]:
    """Those of a model with the same weights that takes no shortcut."""
    plain: Any = _model({**settings, "device": device}, dtype)
    if dtype == "float64":
        plain.double()
    plain.load_state_dict(model.state_dict())
    for _, layer in lora_layers(plain):
        assert isinstance(layer, LoRALinear)
        layer.has_fast_path = False
    return _gradients(plain, _to(collate_padded(examples(settings)), device), ForwardPath(False, False, ""))


def _gradients(model: Any, batch: dict[str, Any], path: ForwardPath) -> dict[str, Tensor]:
    model.zero_grad()
    nll_sum = language_model_loss(model.train(), batch, path).nll_sum
    (nll_sum / batch["target_ids"].numel()).backward()
    found = {name: p.grad.detach().cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": nll_sum.detach().cpu().double()}


def _worst_error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert got.keys() == exact.keys(), "different parameters train"
    return max(float((got[name] - exact[name]).norm() / exact[name].norm()) for name in exact)


def _to(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _verdict(holds: bool) -> str:
    return "passed" if holds else "failed"
