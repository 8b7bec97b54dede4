"""The fast path against the readable one: value and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lit_lora import LoRAConfig, QuantizationConfig
from lit_lora.adapters.functional import lora_linear, lora_linear_reference
from lit_lora.adapters.layers import LoRALinear
from lit_lora.base import base_weight
from lit_lora.base.quantize import quantize_

NUM_IN, NUM_OUT, RANK = 24, 40, 4
INPUTS = {
    "2d": lambda: torch.randn(7, NUM_IN),
    "3d": lambda: torch.randn(2, 5, NUM_IN),
    "1d": lambda: torch.randn(NUM_IN),
    "noncontiguous": lambda: torch.randn(5, NUM_IN, 2).transpose(1, 2),
    "strided": lambda: torch.randn(6, 2 * NUM_IN)[:, ::2],
    "no tokens": lambda: torch.randn(0, NUM_IN),
}


def _operands(dtype=torch.float32, adapter_dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    weight = torch.randn(NUM_OUT, NUM_IN).to(dtype)
    bias_ = torch.randn(NUM_OUT).to(dtype).requires_grad_() if bias else None
    lora_A = torch.randn(RANK, NUM_IN).to(adapter_dtype).requires_grad_()
    lora_B = torch.randn(NUM_OUT, RANK).to(adapter_dtype).requires_grad_()
    return weight, bias_, lora_A, lora_B


def _run(function, x, operands, scaling=1.7):
    leaves = [t for t in (x, *operands) if t is not None and t.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    out = function(x, *operands, scaling)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *(leaf.grad.clone() for leaf in leaves)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
@pytest.mark.parametrize("make_input", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.float32, torch.bfloat16, 3e-2),
    ],
)
def test_fast_path_equals_the_reference(dtype, adapter_dtype, tolerance, make_input, needs_input_gradient, bias):
    operands = _operands(dtype, adapter_dtype, bias)
    x = make_input().to(dtype).requires_grad_(needs_input_gradient)
    expected = _run(lora_linear_reference, x, operands)
    got = _run(lora_linear, x, operands)
    assert len(got) == 3 + bias + needs_input_gradient
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, _size(theirs)))


def _size(tensor):
    return tensor.abs().max().item() if tensor.numel() else 1.0


def test_gradients_are_those_of_finite_differences():
    weight, bias, lora_A, lora_B = (t.detach().double() for t in _operands())
    x = torch.randn(3, NUM_IN, dtype=torch.float64, requires_grad=True)
    inputs = (x, bias.requires_grad_(), lora_A.requires_grad_(), lora_B.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, b, A, B: lora_linear(x, weight, b, A, B, 0.5), inputs)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_converts_as_linear_does(input_dtype):
    operands = _operands()
    x = torch.randn(6, NUM_IN).to(input_dtype).requires_grad_()

    def under_autocast(function):
        def run(*args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return function(*args)

        return run

    expected = _run(under_autocast(lora_linear_reference), x, operands)
    first = _run(under_autocast(lora_linear), x, operands)
    second = _run(under_autocast(lora_linear), x, operands)
    assert first[0].dtype == torch.bfloat16
    for ours, again, theirs in zip(first, second, expected, strict=True):
        assert torch.equal(ours, again)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2 * _size(theirs))


def test_a_backward_inside_autocast_gives_the_same_gradients():
    operands = _operands()
    x = torch.randn(6, NUM_IN, requires_grad=True)
    expected = _run(lora_linear, x, operands)
    for leaf in (x, *operands[1:]):
        leaf.grad = None
    out = lora_linear(x, *operands, 1.7)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward(torch.randn(out.shape))
    for leaf, gradient in zip((x, *operands[1:]), expected[1:], strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_it_keeps_only_the_input_and_the_rank_wide_product():
    weight, bias, lora_A, lora_B = _operands(bias=False)
    x = torch.randn(64, NUM_IN, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, weight, bias, lora_A, lora_B, 1.0)
    parameters = {t.data_ptr() for t in (weight, lora_A, lora_B)}
    activations = [t for t in saved if t.data_ptr() not in parameters]
    assert sorted(tuple(t.shape) for t in activations) == [(64, RANK), (64, NUM_IN)]
    assert any(t.data_ptr() == x.data_ptr() for t in activations)


def test_a_second_derivative_is_refused_and_not_wrong():
    operands = _operands()
    x = torch.randn(3, NUM_IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(lora_linear(x, *operands, 1.0).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def _layer(base, **fields):
    layer = LoRALinear(base.requires_grad_(False), LoRAConfig(r=RANK, **fields), r=RANK, lora_alpha=8)
    torch.manual_seed(3)
    with torch.no_grad():
        for factor in layer.factors():
            factor.normal_()
    return layer


@pytest.mark.parametrize("make_base", [lambda: nn.Linear(NUM_IN, NUM_OUT), lambda: Conv1D(NUM_OUT, NUM_IN)])
def test_checkpointing_gives_the_same_gradients(make_base):
    layer = _layer(make_base())
    x = torch.randn(2, 5, NUM_IN, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in (x, *layer.factors())]
    for leaf in (x, *layer.factors()):
        leaf.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for leaf, gradient in zip((x, *layer.factors()), expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_conv1d_equals_the_linear_layer_with_the_same_weight():
    conv, linear = Conv1D(NUM_OUT, NUM_IN), nn.Linear(NUM_IN, NUM_OUT)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    x = torch.randn(3, NUM_IN)
    torch.testing.assert_close(_layer(conv)(x), _layer(linear)(x))


def _quantized(bits, **fields):
    model = nn.Sequential(nn.Linear(64, 96))
    quantize_(model, QuantizationConfig(bits=bits, **fields))
    return model[0]


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 4, "double_quant": False, "quant_type": "fp4"}, {"bits": 8}])
def test_quantized_base_gives_the_values_and_gradients_of_its_dequantized_weight(fields):
    torch.manual_seed(0)
    base = _quantized(**fields)
    layer = _layer(base)
    plain = nn.Linear(64, 96)
    with torch.no_grad():
        plain.weight.copy_(base_weight.read_weight(base))
        plain.bias.copy_(base.bias)
    expected = _layer(plain)
    x, y = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    assert torch.equal(layer(x), expected(y))
    layer(x).square().sum().backward()
    expected(y).square().sum().backward()
    for ours, theirs in zip((x, *layer.factors()), (y, *expected.factors()), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_input_gradient_is_exactly_the_product_with_the_dequantized_weight(bits):
    layer = _layer(_quantized(bits))
    layer.lora_B.weight.data.zero_()
    x = torch.randn(5, 64, requires_grad=True)
    gradient = torch.randn(5, 96)
    layer(x).backward(gradient)
    assert torch.equal(x.grad, gradient @ base_weight.read_weight(layer.base_layer))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_dequantized_weight_is_kept_for_the_backward(bits):
    layer = _layer(_quantized(bits))
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t)
    with hooks:
        layer(torch.randn(2, 64, requires_grad=True))
    assert max(sizes) < 64 * 96


def test_dequantized_weight_is_bit_for_bit_that_of_bitsandbytes():
    import bitsandbytes as bnb

    base = _quantized(4)
    expected = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    assert torch.equal(base_weight.read_weight(base), expected)


def test_an_eval_forward_does_not_repack_4_bit_weights():
    layer = _layer(_quantized(4)).eval()
    codes = layer.base_layer.weight.data.clone()
    layer.enabled = False
    with torch.no_grad():
        layer(torch.randn(3, 64))
    assert torch.equal(layer.base_layer.weight.data, codes)
    assert not getattr(layer.base_layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_compute_dtype_of_a_4_bit_base_is_followed(compute):
    base = _quantized(4, compute_dtype=str(compute).removeprefix("torch."))
    layer = _layer(base)
    layer.lora_B.weight.data.zero_()
    x = torch.randn(5, 64, requires_grad=True)
    out = layer(x)
    assert out.dtype == x.dtype
    assert torch.equal(out, base(x))


class _Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked():
    base = nn.Linear(NUM_IN, NUM_OUT)
    base.register_forward_hook(lambda module, args, out: 2 * out)
    return base


def _patched():
    base = nn.Linear(NUM_IN, NUM_OUT)
    forward = base.forward
    base.forward = lambda x: 2 * forward(x)
    return base


@pytest.mark.parametrize("make_base", [lambda: _Doubling(NUM_IN, NUM_OUT), _hooked, _patched])
def test_a_base_layer_that_does_more_than_a_product_is_called(make_base):
    layer = _layer(make_base())
    layer.lora_B.weight.data.zero_()
    x = torch.randn(3, NUM_IN)
    base = layer.base_layer
    torch.testing.assert_close(layer(x), 2 * F.linear(x, base.weight, base.bias))


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    layer = _layer(nn.Linear(NUM_IN, NUM_OUT), lora_dropout=0.5)
    x = torch.randn(64, NUM_IN)
    torch.manual_seed(0)
    dropped = layer.train()(x)
    kept = layer.eval()(x)
    torch.manual_seed(0)
    expected = lora_linear_reference(
        x, layer.base_layer.weight, layer.base_layer.bias, *layer.factors(), layer.scaling, dropout=0.5
    )
    assert torch.equal(dropped, expected)
    assert not torch.allclose(dropped, kept)
    layer.lora_B.weight.data.zero_()
    torch.testing.assert_close(layer.train()(x), layer.base_layer(x))


def test_a_trainable_base_weight_gets_its_gradient():
    layer = _layer(nn.Linear(NUM_IN, NUM_OUT))
    layer.base_layer.requires_grad_(True)
    layer(torch.randn(3, NUM_IN)).sum().backward()
    assert layer.base_layer.weight.grad is not None
    assert layer.base_layer.bias.grad is not None


def test_mixed_dtypes_fail_as_linear_does():
    layer = _layer(nn.Linear(NUM_IN, NUM_OUT, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(torch.randn(3, NUM_IN))


def test_a_copied_layer_computes_the_same():
    layer = _layer(_quantized(4))
    x = torch.randn(3, 64)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_result_may_be_changed_in_place():
    """As Gemma 3n does with a projection."""
    torch.manual_seed(0)
    layer = _layer(nn.Linear(NUM_IN, NUM_OUT))
    x = torch.randn(2, 3, NUM_IN)
    gradients = []
    for change in (lambda y: y.mul_(2.0), lambda y: y * 2.0):
        layer.zero_grad()
        change(layer(x)).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2
    for changed, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(changed, expected)
