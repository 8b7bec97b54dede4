"""Norms, rotary positions and SwiGLU in one kernel each: value and every gradient against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from lit_lora.kernels.elementwise import rms_norm, rotate, swiglu, swiglu_backward
from tests.cuda_way import DEVICES, cuda_way

EPS = 1e-5
# Relative to the largest: the result is rounded once.
TOLERANCES = [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]
LAYOUTS = {
    "queries and keys": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a wider tensor": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
}


def _formula(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """As transformers writes it."""

    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    return tuple(x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (query, key))


def _norm_formula(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight,)


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    ours, theirs = ours.detach().cpu().double(), theirs.detach()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def _compare(
    function: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    num_trained: int,
    tolerance: float,
) -> None:
    """Outputs, and gradients of the first so many inputs."""
    exact = [x.detach().cpu().double() for x in inputs]
    for tensors in (inputs, exact):
        for x in tensors[:num_trained]:
            x.requires_grad_()
    outs, expected = function(*inputs), formula(*exact)
    grads = [torch.randn(out.shape, generator=torch.Generator().manual_seed(i)) for i, out in enumerate(expected)]
    grads = [grad.to(inputs[0].dtype) for grad in grads]
    got = [*outs, *torch.autograd.grad(outs, inputs[:num_trained], [g.to(inputs[0].device) for g in grads])]
    expected = [*expected, *torch.autograd.grad(expected, exact[:num_trained], [grad.double() for grad in grads])]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == inputs[0].dtype
        _close(ours, theirs, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "width"), [((9, 3), 64), ((4, 4), 48), ((3, 1), 6)])
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation_is_that_of_transformers(device, dtype, tolerance, layout, heads, width, rows):
    with cuda_way(device):
        torch.manual_seed(0)
        query, key = (LAYOUTS[layout](torch.randn(rows, n, 7, width).to(device, dtype)).detach() for n in heads)
        cos, sin = (torch.randn(1, 7, width).to(device, dtype) for _ in range(2))
        _compare(rotate, _formula, (query, key, cos, sin), 2, tolerance)


def test_rotated_heads_lie_as_attention_over_a_packed_batch_reads_them():
    query, key = (torch.randn(1, n, 7, 8).bfloat16() for n in (4, 2))
    cos, sin = (torch.randn(1, 7, 8).bfloat16() for _ in range(2))
    for out in rotate(query, key, cos, sin):
        assert out.squeeze(0).transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_norm_is_that_of_transformers(device, dtype, tolerance):
    with cuda_way(device):
        torch.manual_seed(0)
        x, weight = torch.randn(2, 5, 48).to(device, dtype), torch.rand(48).to(device, dtype)
        _compare(lambda x, w: (rms_norm(x, w, EPS),), _norm_formula, (x, weight), 1, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_swiglu_and_its_gradients(device, dtype, tolerance):
    with cuda_way(device):
        torch.manual_seed(0)
        gate, up, grad = (3 * torch.randn(300, 1100).to(device, dtype) for _ in range(3))  # several blocks of rows
        before = gate.clone(), up.clone()
        exact = [x.cpu().double().requires_grad_() for x in (gate, up)]
        expected = F.silu(exact[0]) * exact[1]
        out = swiglu(gate, up)
        expected = [expected, *torch.autograd.grad(expected, exact, grad.cpu().double())]
        got = [out, *swiglu_backward(gate, up, grad)]
        assert got[1] is grad
        assert torch.equal(gate, before[0])
        assert torch.equal(up, before[1])
        for ours, theirs in zip(got, expected, strict=True):
            _close(ours, theirs, tolerance)


def test_without_values_they_allocate_what_the_kernels_do():
    with FakeTensorMode():
        x, heads, cos = torch.randn(1, 7, 16).bfloat16(), torch.randn(1, 2, 7, 8).bfloat16(), torch.randn(1, 7, 8)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = rms_norm(x.requires_grad_(), torch.ones(16).bfloat16(), EPS)
            turned = rotate(heads.requires_grad_(), heads, cos.bfloat16(), cos.bfloat16())
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        assert [(t.shape, t.dtype) for t in turned] == [(heads.shape, heads.dtype)] * 2
        assert sum(t.nbytes for t in kept if t is not x) == 7 * 4 + 2 * cos.bfloat16().nbytes
        grads = torch.autograd.grad([out.sum(), *(t.sum() for t in turned)], [x, heads])
        assert [grad.shape for grad in grads] == [x.shape, heads.shape]
        gate = torch.randn(5, 8)
        assert swiglu(gate, gate).shape == gate.shape
        assert [t.shape for t in swiglu_backward(gate, gate, torch.randn(5, 8))] == [gate.shape] * 2
