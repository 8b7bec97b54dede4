"""The product of a frozen weight and its low-rank adapter: a readable reference and the fast path.

Shapes: T tokens (all leading dimensions flattened), I input features, O output features, R rank.

Autograd through the reference keeps the input twice (once per product), the r-wide product, and makes a copy of the
output for the scale and one for the sum. The fast path keeps the input and the r-wide product, and scales and adds
inside the matrix product. For a quantized weight it dequantizes again in the backward instead of keeping the result.
Half precision has a function of its own (``half_precision.py``). Left out on purpose: dropout (the reference
serves it), and stacked projections, which gained nothing on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_lora.adapters.half_precision import Adapted, lora_linears
from lit_lora.base import base_weight
from lit_lora.base.quantized_linear import autocast_dtype, without_autocast
from lit_lora.kernels import products
from lit_lora.kernels.cuda_way import HALF, computes_half


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``x @ W.T + bias + scaling * dropout(x) @ A.T @ B.T`` (LoRA, arXiv:2106.09685, eq. 3).

    Args:
        x: input, ``(..., I)``.
        weight: base weight, ``(O, I)``.
        bias: base bias, ``(O,)``.
        lora_A: down projection, ``(R, I)``.
        lora_B: up projection, ``(O, R)``.
        scaling: factor on the adapter's output.
        dropout: probability of dropping an element of the adapter's input.

    Returns:
        ``(..., O)``, in the dtype of the base product.
    """
    return add_lora(F.linear(x, weight, bias), x, lora_A, lora_B, scaling, dropout)


def add_lora(
    base_out: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The adapter's output on top of the base layer's, the adapter computed in its own dtype (as PEFT does)."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(lora_A.dtype)
    if dropout:
        x = F.dropout(x, dropout)
    return (base_out + F.linear(F.linear(x, lora_A), lora_B, bias) * scaling).to(base_out.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor | nn.Module,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    up: Tensor | None = None,
) -> Tensor:
    """The value and the gradients of :func:`lora_linear_reference`, with less memory and fewer passes over it.

    Under autocast every operand is converted as ``F.linear`` would convert it.

    Args:
        x: input, ``(..., I)``; with ``up``, the input is ``silu(x) * up`` (SwiGLU), made again in the backward pass.
        weight: frozen base weight, ``(O, I)``, or a quantized layer, which is then dequantized in each direction.
        bias: base bias, ``(O,)``.
        lora_A: down projection, ``(R, I)``.
        lora_B: up projection, ``(O, R)``.
        scaling: factor on the adapter's output.
        up: the other half of a gated input, ``(..., I)``.

    Returns:
        ``(..., O)``; can be differentiated once.
    """
    layer = weight if isinstance(weight, nn.Module) else None
    assert layer is not None or not weight.requires_grad, "the fast path has no gradient for the base weight"
    autocast = autocast_dtype(x)
    if autocast is None and isinstance(weight, Tensor) and x.dtype != weight.dtype:
        x = x if up is None else _swiglu(x, up)
        return lora_linear_reference(x, weight, bias, lora_A, lora_B, scaling)  # fails just as F.linear does
    product = autocast or (x.dtype if layer is None else base_weight.compute_dtype(layer, x.dtype))
    if half_precision(x, weight) is not None:
        return lora_linears(x, [Adapted(weight, bias, lora_A, lora_B, scaling)], product, up)[0]
    dtypes = (product, autocast or lora_A.dtype, autocast or x.dtype)
    plain = None if layer is not None else weight
    return _LoRALinear.apply(x, up, plain, bias, lora_A, lora_B, scaling, layer, dtypes)


def half_precision(x: Tensor, weight: Tensor | nn.Module) -> torch.dtype | None:
    """The type of all products of an adapted layer; None where there are several, or it is full precision."""
    if not computes_half(x):
        return None
    autocast = autocast_dtype(x)
    product = autocast or (weight.dtype if isinstance(weight, Tensor) else base_weight.compute_dtype(weight, x.dtype))
    return product if product in HALF and product == (autocast or x.dtype) else None


class _LoRALinear(torch.autograd.Function):
    """dtypes: of the base product, of the adapter's products, of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        weight_OI: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        layer: nn.Module | None,
        dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    ) -> Tensor:
        product, adapter, out = dtypes
        with without_autocast(x):
            x_TI = (x if up is None else _swiglu(x, up)).reshape(-1, x.shape[-1])
            weight = _weight(layer, weight_OI, product)
            y_TO = products.linear(x_TI.to(product), weight, None if bias is None else bias.to(product)).to(out)
            down_TR = products.linear(x_TI.to(adapter), lora_A.to(adapter))
            _add_product_(y_TO, down_TR, lora_B.to(adapter).t(), scaling)
        ctx.save_for_backward(x, up, weight_OI, lora_A, lora_B, down_TR)
        ctx.scaling, ctx.layer, ctx.dtypes = scaling, layer, dtypes
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Not a view: autograd forbids to change in place what a function returns as a view of its own.
        return torch.ops.aten._unsafe_view(y_TO, (*x.shape[:-1], y_TO.shape[-1]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, weight_OI, lora_A, lora_B, down_TR = ctx.saved_tensors
        product, adapter, _ = ctx.dtypes
        needs_gate, needs_up, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:6]
        needs_x = needs_gate or needs_up
        grad_x = grad_up = grad_bias = grad_A = grad_B = None
        with without_autocast(grad):
            grad_TO = grad.reshape(-1, grad.shape[-1])
            grad_adapter_TO = grad_TO.to(adapter)
            silu = None if up is None else F.silu(x)
            if needs_B:
                # Not (O, T) @ (T, R): a product with so few columns is up to twenty times slower on a CPU.
                grad_B_RO = products.matmul(down_TR.t(), grad_adapter_TO).mul_(ctx.scaling)
                grad_B = grad_B_RO.t().to(lora_B.dtype, memory_format=torch.contiguous_format)
            if needs_A or needs_x:
                grad_down_TR = products.matmul(grad_adapter_TO, lora_B.to(adapter)).mul_(ctx.scaling)
            if needs_A:
                x_TI = (x if silu is None else silu * up).reshape(-1, x.shape[-1])
                grad_A = products.matmul(grad_down_TR.t(), x_TI.to(adapter)).to(lora_A.dtype)
                del x_TI
            if needs_x:
                grad_TI = products.matmul(grad_TO.to(product), _weight(ctx.layer, weight_OI, product, grad)).to(x.dtype)
                grad_x = _add_product_(grad_TI, grad_down_TR, lora_A.to(adapter), 1.0).view(x.shape)
                if silu is not None:
                    grad_up = silu.mul_(grad_x)
                    grad_x = torch.ops.aten.silu_backward(grad_x.mul_(up), x)
            if needs_bias:
                grad_bias = grad_TO.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_up, None, grad_bias, grad_A, grad_B, None, None, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up) if not torch.is_grad_enabled() else F.silu(gate) * up


def _weight(
    layer: nn.Module | None, weight: Tensor | None, dtype: torch.dtype, gradient: Tensor | None = None
) -> Tensor:
    if layer is not None:
        return base_weight.read_weight(layer, dtype, gradient=gradient)
    assert weight is not None
    return weight.to(dtype)


def _add_product_(total: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``total += scale * left @ right``, rounded once to the dtype of ``total``."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right, alpha=scale)
    return total.add_(left @ right, alpha=scale)
