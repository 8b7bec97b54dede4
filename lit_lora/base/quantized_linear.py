"""The product with a quantized weight, dequantized in each direction instead of being kept.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.base import base_weight
from lit_lora.kernels import products


def quantized_linear(x: Tensor, layer: nn.Module) -> Tensor:
    """``x @ W.T + bias`` of a quantized layer, its weight dequantized in each direction instead of being kept.

    Under autocast in its dtype, as ``F.linear`` computes.

    Args:
        x: input, ``(..., I)``.
        layer: frozen, with a weight that ``base_weight.read_weight`` dequantizes.

    Returns:
        ``(..., O)``; can be differentiated once.
    """
    autocast = autocast_dtype(x)
    dtypes = (autocast or base_weight.compute_dtype(layer, x.dtype), autocast or x.dtype)
    return _QuantizedLinear.apply(x, layer.bias, layer, dtypes)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast converts a product's operands to; None where it does not."""
    enabled = torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(x.device.type) if enabled else None


class _QuantizedLinear(torch.autograd.Function):
    """dtypes: of the product, of the output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> Tensor:
        product, out = dtypes
        ctx.layer, ctx.product, ctx.x_dtype = layer, product, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        with without_autocast(x):
            weight = base_weight.read_weight(layer, product)
            x_TI = x.reshape(-1, x.shape[-1]).to(product)
            y_TO = products.linear(x_TI, weight, None if bias is None else bias.to(product)).to(out)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = grad_bias = None
        with without_autocast(grad):
            grad_TO = grad.reshape(-1, grad.shape[-1])
            if ctx.needs_input_grad[0]:
                weight = base_weight.read_weight(ctx.layer, ctx.product, gradient=grad)
                grad_TI = products.matmul(grad_TO.to(ctx.product), weight).to(ctx.x_dtype)
                grad_x = grad_TI.view(*grad.shape[:-1], grad_TI.shape[-1])
            if ctx.needs_input_grad[1]:
                grad_bias = grad_TO.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_bias, None, None


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Conversions are explicit here, in both directions, whatever mode the backward is called in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
