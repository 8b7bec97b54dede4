"""Frozen weights and their adapters in half precision: one or several layers of the same input.

The adapter's products take the input as it is, and A and B rounded to its type, as autocast would; no float32 copy of
anything as long as the batch is made. The parameters stay float32, and their gradients, sums over all tokens, are
summed and delivered in float32; on a CPU a sum is rounded on its way. Layers that read the same input (queries, keys
and values; gate and up) share the product with their stacked A, and add their gradients of the input up in one buffer.

The base's product is summed onto the adapter's, and the sum rounded once. In the other order an adapter whose share is
below half of the last bit of the output would add nothing at all, which is most of it at the start of training
(``benchmarks/NOTES.md``).

Few launches count as much as few bytes: small models wait for the host. Scales are factors of products, and one launch
converts all factors.

Shapes: T tokens, I input features, O output features of a layer, R rank of a layer or of all stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_lora.base import base_weight
from lit_lora.base.quantized_linear import without_autocast
from lit_lora.kernels.elementwise import swiglu, swiglu_backward
from lit_lora.kernels.products import matmul_float32


class Adapted(NamedTuple):
    """A frozen linear layer and its adapter."""

    weight: Tensor | nn.Module
    """``(O, I)``, or a quantized layer, which is dequantized in each direction."""
    bias: Tensor | None
    """``(O,)``."""
    lora_A: Tensor
    """``(R, I)``."""
    lora_B: Tensor
    """``(O, R)``."""
    scaling: float


def lora_linears(
    x: Tensor, adapted: Sequence[Adapted], dtype: torch.dtype, up: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``x @ W.T + bias + scaling * x @ A.T @ B.T`` of each layer.

    Args:
        x: input of all, ``(..., I)``; with ``up``, the input is ``silu(x) * up``, made again in the backward pass.
        adapted: the layers.
        dtype: half precision, of all products and of the outputs.
        up: the other half of a gated input, ``(..., I)``.

    Returns:
        ``(..., O)`` each; can be differentiated once.
    """
    layers = [each.weight if isinstance(each.weight, nn.Module) else None for each in adapted]
    tensors: list[Tensor | None] = []
    for each in adapted:
        plain = None if isinstance(each.weight, nn.Module) else each.weight
        tensors += [plain, each.bias, each.lora_A, each.lora_B]
    scalings = [each.scaling for each in adapted]
    if not torch.is_grad_enabled():  # a token that is generated is little work, and a function's record much of it
        return _outputs(x, up, layers, scalings, dtype, tensors)[0]
    return _LoRALinears.apply(x, up, layers, scalings, dtype, *tensors)


class RoundedFactors(NamedTuple):
    """A and B in half precision, for many calls between which nothing is trained."""

    A_IR: Tensor
    B_RO: Tensor
    scaling: float
    unread: Tensor
    """What a product is added to that is added to nothing."""

    @classmethod
    def of(cls, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> RoundedFactors:
        """Of A ``(R, I)`` and B ``(O, R)``."""
        A_RI, B_OR = (factor.detach().to(dtype) for factor in (lora_A, lora_B))
        return cls(A_RI.t(), B_OR.t(), scaling, A_RI.new_empty(()))


def rounded_linear(
    x: Tensor, up: Tensor | None, weight_OI: Tensor, bias: Tensor | None, factors: RoundedFactors
) -> Tensor:
    """What :func:`lora_linears` gives for one layer, bit for bit, for operands that are all in half precision.

    With 25 rows (Zen 4) the adapter of a layer of 576 x 576 takes 45 us in place of 140: the rest of it was to find out
    what can be computed how, and to round the factors.
    """
    x_TI = _input(x, up, factors.A_IR.dtype)
    A_IR, B_RO, scaling, unread = factors
    y_TO = torch.addmm(unread, torch.mm(x_TI, A_IR), B_RO, beta=0, alpha=scaling).addmm_(x_TI, weight_OI.t())
    if bias is not None:
        y_TO.add_(bias)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


def _outputs(
    x: Tensor,
    up: Tensor | None,
    layers: Sequence[nn.Module | None],
    scalings: Sequence[float],
    dtype: torch.dtype,
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Sequence[Tensor]]:
    """The outputs; and of the factors: A stacked, what it made of the input, and each B."""
    weights, biases, lora_As, lora_Bs = (tensors[kind::4] for kind in range(4))
    with without_autocast(x):
        x_TI = _input(x, up, dtype)
        A_RI, B_ORs = _in_half_precision(lora_As, lora_Bs, dtype)
        down_TR = F.linear(x_TI, A_RI)
        outs = []
        for layer, weight, bias, down, B_OR, scaling in zip(
            layers, weights, biases, _by_layer(down_TR, B_ORs), B_ORs, scalings, strict=True
        ):
            y_TO = _product(down, B_OR.t(), scaling).addmm_(x_TI, _weight(layer, weight, dtype).t())
            if bias is not None:
                y_TO.add_(bias.to(dtype))
            # Not a view: autograd forbids to change in place what a function returns as a view of its own.
            outs.append(torch.ops.aten._unsafe_view(y_TO, (*x.shape[:-1], y_TO.shape[-1])))
    return tuple(outs), A_RI, down_TR, B_ORs


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        layers: list[nn.Module | None],
        scalings: list[float],
        dtype: torch.dtype,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outs, A_RI, down_TR, B_ORs = _outputs(x, up, layers, scalings, dtype, tensors)
        weights, *kinds = (tensors[kind::4] for kind in range(4))
        ctx.save_for_backward(x, up, A_RI, down_TR, *B_ORs, *weights)
        ctx.layers, ctx.scalings, ctx.dtype = layers, scalings, dtype
        ctx.kinds = [[None if t is None else t.dtype for t in kind] for kind in kinds]
        return outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, up, A_RI, down_TR, *rest = ctx.saved_tensors
        B_ORs, weights = rest[: len(grads)], rest[len(grads) :]
        needs_x = any(ctx.needs_input_grad[:2])
        _, needs_bias, needs_A, needs_B = (ctx.needs_input_grad[5 + kind :: 4] for kind in range(4))
        bias_dtypes, A_dtypes, B_dtypes = ctx.kinds
        grad_x = grad_up = None
        none: list[Tensor | None] = [None] * len(grads)
        grad_biases, grad_As, grad_Bs = list(none), list(none), list(none)
        with without_autocast(x):
            grads_TO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
            downs = _by_layer(down_TR, B_ORs)
            for i, (grad_TO, scaling) in enumerate(zip(grads_TO, ctx.scalings, strict=True)):
                if needs_B[i]:
                    grad_Bs[i] = matmul_float32(grad_TO.t(), downs[i], scaling).to(B_dtypes[i])
                if needs_bias[i]:
                    grad_biases[i] = grad_TO.sum(0, dtype=bias_dtypes[i])
            if needs_x or any(needs_A):
                grad_down_TR = _gradient_of_down(grads_TO, B_ORs, ctx.scalings)
            if any(needs_A):
                stacked_RI = matmul_float32(grad_down_TR.t(), _input(x, up, ctx.dtype))
                for i, grad_A in enumerate(stacked_RI.split([B_OR.shape[1] for B_OR in B_ORs])):
                    grad_As[i] = grad_A.to(A_dtypes[i]) if needs_A[i] else None
            if needs_x:
                grad_TI = grad_down_TR @ A_RI
                for layer, weight, grad_TO in zip(ctx.layers, weights, grads_TO, strict=True):
                    grad_TI.addmm_(grad_TO, _weight(layer, weight, ctx.dtype, grad_TO))
                grad_x = grad_TI.to(x.dtype).view(x.shape)
                if up is not None:
                    grad_x, grad_up = swiglu_backward(x, up, grad_x)
        of_layers = [grad for i in range(len(grads)) for grad in (None, grad_biases[i], grad_As[i], grad_Bs[i])]
        return grad_x, grad_up, None, None, None, *of_layers


def _input(x: Tensor, up: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (x if up is None else swiglu(x, up)).reshape(-1, x.shape[-1]).to(dtype)


def _in_half_precision(
    lora_As: Sequence[Any], lora_Bs: Sequence[Any], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """All A stacked, ``(R, I)``, and every B."""
    if torch.compiler.is_compiling() or (len(lora_As) == 1 and lora_As[0].dtype == lora_Bs[0].dtype == dtype):
        return torch.cat([A.to(dtype) for A in lora_As]) if len(lora_As) > 1 else lora_As[0].to(dtype), [
            B.to(dtype) for B in lora_Bs
        ]
    ranks = [len(A) for A in lora_As]
    stacked_RI = lora_As[0].new_empty((sum(ranks), lora_As[0].shape[1]), dtype=dtype)
    B_ORs = [torch.empty_like(B, dtype=dtype) for B in lora_Bs]
    torch._foreach_copy_([*stacked_RI.split(ranks), *B_ORs], [*lora_As, *lora_Bs])
    return stacked_RI, B_ORs


def _by_layer(stacked_TR: Tensor, B_ORs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return stacked_TR.split([B_OR.shape[1] for B_OR in B_ORs], dim=1)


def _gradient_of_down(grads_TO: list[Tensor], B_ORs: Sequence[Tensor], scalings: list[float]) -> Tensor:
    if len(grads_TO) == 1:
        return _product(grads_TO[0], B_ORs[0], scalings[0])
    stacked_TR = grads_TO[0].new_empty((len(grads_TO[0]), sum(B_OR.shape[1] for B_OR in B_ORs)))
    for out, grad_TO, B_OR, scaling in zip(_by_layer(stacked_TR, B_ORs), grads_TO, B_ORs, scalings, strict=True):
        torch.addmm(out, grad_TO, B_OR, beta=0, alpha=scaling, out=out)
    return stacked_TR


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left @ right`` in one launch."""
    unread = left.new_empty(())  # with beta=0
    return torch.addmm(unread, left, right, beta=0, alpha=scale)


def _weight(
    layer: nn.Module | None, weight: Tensor | None, dtype: torch.dtype, gradient: Tensor | None = None
) -> Tensor:
    if layer is not None:
        return base_weight.read_weight(layer, dtype, gradient=gradient)
    assert weight is not None
    return weight.to(dtype)
