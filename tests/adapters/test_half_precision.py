"""Adapted layers in half precision, as on CUDA: values and gradients against float64, and what they hold meanwhile."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lit_lora import LoRAConfig, QuantizationConfig
from lit_lora.adapters.functional import lora_linear, lora_linear_reference
from lit_lora.adapters.half_precision import Adapted, lora_linears
from lit_lora.adapters.layers import LoRALinear
from lit_lora.base import base_weight
from lit_lora.base.quantize import quantize_
from lit_lora.kernels.cuda_way import as_on_cuda
from tests.cuda_way import DEVICES, cuda_way

# torch's remark where a process's first product is one of the backward pass's own thread.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")

NUM_IN, NUM_OUTS, RANK = 64, (96, 32, 32), 4
# Relative to the norm of each tensor: operands are rounded to half precision, sums are not.
TOLERANCES = [(torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)]


def _layers(dtype, device, count, *, bias):
    torch.manual_seed(0)
    made = []
    for index, num_out in enumerate(NUM_OUTS[:count]):
        rank = RANK + index
        made.append(
            Adapted(
                (torch.randn(num_out, NUM_IN) / 8).to(device, dtype),
                torch.randn(num_out).to(device, dtype).requires_grad_() if bias else None,
                (torch.randn(rank, NUM_IN) / 8).to(device).requires_grad_(),
                torch.randn(num_out, rank).to(device).requires_grad_(),
                1.7 + index,
            )
        )
    return made


def _outputs_and_gradients(outs, leaves):
    grads = [torch.randn(out.shape, generator=torch.Generator().manual_seed(i)) for i, out in enumerate(outs)]
    grads = [grad.bfloat16().to(out.device, out.dtype) for grad, out in zip(grads, outs, strict=True)]
    return [*outs, *torch.autograd.grad(outs, leaves, grads)]


def _error(got, exact):
    return float((got.detach().cpu().double() - exact.detach().double()).norm() / exact.detach().double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_float64(device, dtype, tolerance, count, gated, bias):
    with cuda_way(device):
        layers = _layers(dtype, device, count, bias=bias)
        x, up = (torch.randn(2, 9, NUM_IN).to(device, dtype).requires_grad_() for _ in range(2))
        leaves = [x, *([up] if gated else []), *(t for layer in layers for t in layer[1:4] if t is not None)]
        got = _outputs_and_gradients(lora_linears(x, layers, dtype, up if gated else None), leaves)
        exact = {id(t): t.detach().cpu().double().requires_grad_() for t in leaves}
        x64 = F.silu(exact[id(x)]) * exact[id(up)] if gated else exact[id(x)]
        outs = [
            lora_linear_reference(
                x64, layer.weight.cpu().double(), exact.get(id(layer.bias)), exact[id(layer.lora_A)],
                exact[id(layer.lora_B)], layer.scaling,
            )
            for layer in layers
        ]  # fmt: skip
        expected = _outputs_and_gradients(outs, list(exact.values()))
        assert [t.dtype for t in got[count:]] == [t.dtype for t in leaves]
        assert max(map(_error, got, expected)) < tolerance


def test_gradients_of_adapters_are_not_rounded_to_half_precision():
    """A sum of many equal numbers: in bfloat16 the last bits of it are gone."""
    with as_on_cuda():
        num_tokens = 1003
        x, weight = torch.ones(num_tokens, 8).bfloat16(), torch.ones(8, 8).bfloat16()
        lora_A, lora_B = torch.ones(1, 8, requires_grad=True), torch.ones(8, 1, requires_grad=True)
        lora_linear(x, weight, None, lora_A, lora_B, 1.0).sum().backward()
    assert lora_A.grad.unique().tolist() == [num_tokens * 8]
    assert lora_B.grad.unique().tolist() == [num_tokens * 8]
    assert float(torch.tensor(float(num_tokens * 8)).bfloat16()) != num_tokens * 8


@pytest.mark.parametrize("kind", ["4 bits", "8 bits", "Conv1D"])
def test_other_storage_of_the_weight_gives_the_same(kind):
    torch.manual_seed(0)
    base = Conv1D(96, NUM_IN) if kind == "Conv1D" else nn.Sequential(nn.Linear(NUM_IN, 96))
    if kind != "Conv1D":
        quantize_(base, QuantizationConfig(bits=int(kind[0])))
        base = base[0]
    plain = nn.Linear(NUM_IN, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        plain.weight.copy_(base_weight.read_weight(base))
        plain.bias.copy_(base.bias)
    if kind == "Conv1D":
        base.bfloat16()
    layers = [LoRALinear(b.requires_grad_(False), LoRAConfig(r=RANK), r=RANK, lora_alpha=8) for b in (base, plain)]
    for layer in layers:
        torch.manual_seed(1)
        for factor in layer.factors():
            nn.init.normal_(factor)
    if kind == "4 bits":
        base.compute_dtype, base.compute_type_is_set = torch.bfloat16, True
    x = torch.randn(5, NUM_IN).bfloat16().requires_grad_()
    with as_on_cuda():
        ours, expected = (_outputs_and_gradients([layer(x)], [x, *layer.factors()]) for layer in layers)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


class _Float32Seen(TorchDispatchMode):
    """The float32 tensors with as many rows as the batch has tokens."""

    def __init__(self, num_tokens):
        super().__init__()
        self.num_tokens, self.shapes = num_tokens, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dtype == torch.float32]
        self.shapes += [tuple(t.shape) for t in leaves if self.num_tokens in t.shape]
        return out


@pytest.mark.parametrize("on_cuda", [True, False])
@pytest.mark.parametrize("compute", [lora_linear, lora_linear_reference])
def test_no_float32_copy_of_the_batch_is_made(compute, on_cuda, monkeypatch):
    # As a GPU does, and a CPU cannot: half precision in, float32 out.
    monkeypatch.setattr("lit_lora.adapters.half_precision.matmul_float32", lambda a, b, scale=None: (a @ b).float())
    (layer,) = _layers(torch.bfloat16, "cpu", 1, bias=False)
    x = torch.randn(37, NUM_IN).bfloat16().requires_grad_()
    with _Float32Seen(37) as seen, as_on_cuda() if on_cuda else nullcontext():
        compute(x, *layer).sum().backward()
    assert bool(seen.shapes) == (compute is lora_linear_reference)


@pytest.mark.parametrize("on_cuda", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [1, 3])
def test_what_an_adapter_adds_is_not_rounded_away(shared, bias, on_cuda):
    """Far smaller than what it is added to: rounded together with it, it is there on average; rounded after, never."""
    torch.manual_seed(0)
    layers = [
        Adapted(torch.randn(512, NUM_IN).bfloat16(), torch.randn(512).bfloat16() if bias else None, lora_A, lora_B, 1.0)
        for lora_A, lora_B in ((torch.rand(4, NUM_IN), 1e-4 * torch.rand(512, 4)) for _ in range(shared))
    ]
    x = torch.rand(512, NUM_IN).bfloat16().requires_grad_()
    with as_on_cuda() if on_cuda else nullcontext():
        outs = lora_linears(x, layers, torch.bfloat16)
    for out, layer in zip(outs, layers, strict=True):
        bare = F.linear(x, layer.weight, layer.bias).double()
        added = (x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T).mean()
        assert added < bare.abs().mean() / 1000, "half of the last bit of most outputs"
        assert ((out.double() - bare).mean() / added - 1).abs() < 0.1
    ups = [2e-4 * torch.rand_like(out) for out in outs]
    layers = [each._replace(lora_B=1e-2 * torch.rand(512, 4)) for each in layers]
    with as_on_cuda() if on_cuda else nullcontext():
        got = torch.autograd.grad(lora_linears(x, layers, torch.bfloat16), x, ups)[0].double().mean()
    bare = sum(up.double() @ each.weight.double() for up, each in zip(ups, layers, strict=True))
    added = sum(up.double() @ each.lora_B.double() @ each.lora_A.double() for up, each in zip(ups, layers, strict=True))
    assert ((got - bare.mean()) / added.mean() - 1).abs() < 0.1


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"), [(torch.float32, torch.float32), (torch.float64, torch.float64)], ids=str
)
def test_full_precision_is_computed_as_on_a_cpu(x_dtype, weight_dtype):
    weight, _, lora_A, lora_B, scaling = _layers(weight_dtype, "cpu", 1, bias=False)[0]
    x = torch.randn(5, NUM_IN, dtype=x_dtype, requires_grad=True)
    operands = (x, weight, None, lora_A.to(x_dtype), lora_B.to(x_dtype), scaling)
    expected = lora_linear(*operands)
    with as_on_cuda():
        assert torch.equal(lora_linear(*operands), expected)


def test_autocast_decides_the_type():
    weight, _, lora_A, lora_B, scaling = _layers(torch.float32, "cpu", 1, bias=False)[0]
    x = torch.randn(5, NUM_IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = _outputs_and_gradients([lora_linear(x, weight, None, lora_A, lora_B, scaling)], [x, lora_A, lora_B])
        with as_on_cuda():
            outs = [lora_linear(x, weight, None, lora_A, lora_B, scaling)]
    got = _outputs_and_gradients(outs, [x, lora_A, lora_B])
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert _error(ours, theirs) < 1e-2


def test_checkpointing_gives_the_same_gradients():
    layers = _layers(torch.bfloat16, "cpu", 3, bias=False)
    x = torch.randn(2, 5, NUM_IN).bfloat16().requires_grad_()
    leaves = [x, *(t for layer in layers for t in (layer.lora_A, layer.lora_B))]
    with as_on_cuda():
        expected = _outputs_and_gradients(lora_linears(x, layers, torch.bfloat16), leaves)
        again = checkpoint(lambda x: lora_linears(x, layers, torch.bfloat16), x, use_reentrant=False)
        got = _outputs_and_gradients(again, leaves)
    assert all(map(torch.equal, got, expected))


def test_frozen_factors_and_inputs_get_no_gradient():
    weight, _, lora_A, lora_B, scaling = _layers(torch.bfloat16, "cpu", 1, bias=False)[0]
    x = torch.randn(5, NUM_IN).bfloat16()
    with as_on_cuda():
        lora_linear(x, weight, None, lora_A.detach(), lora_B, scaling).sum().backward()
    assert lora_A.grad is None
    assert x.grad is None
    assert lora_B.grad is not None
