"""What a quantized layer computes: one function, in training and evaluation, with an adapter on it or without.

bitsandbytes (0.50) has two for 8 bits. On a CPU it trains with the dequantized weight, and evaluates with activations
that it rounds to 8 bits too, as it does on CUDA always. That rounding takes a column that holds a large value in any
row out of the 8-bit product, so what a token gets depends on the other tokens of its batch: packing, padding and batch
size would all change the result. Here the dequantized weight is the function everywhere.

Both kinds of layer also convert their bias to the dtype of the input for good, in the first forward, and move or repack
what the weight is stored in. The frozen base of a run must stay as it is, so the forwards here write to nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lit_lora.base import base_weight
from lit_lora.base.quantized_linear import autocast_dtype, quantized_linear
from lit_lora.kernels.cuda_way import HALF


class _Prepared:
    """Marks the classes that :func:`prepare_base_layer` gives."""


def prepare_base_layer(name: str, module: Any) -> None:
    """Give a quantized layer of bitsandbytes the forward of this file; others are left alone.

    Raises:
        ValueError: on a CPU, if blocks run over the ends of rows: with AVX512 bitsandbytes (0.50) then multiplies with
            the scales of other blocks, without a word.
    """
    if isinstance(module, _Prepared) or not base_weight.may_be_quantized(module):
        return
    if base_weight.is_4bit(module):
        _check_blocks(name, module)
        base_weight.unpack_(module)
        module.__class__ = _prepared(module.__class__, _forward_4bit)
    elif base_weight.is_quantized(module):
        module.__class__ = _prepared(module.__class__, _forward_8bit)


def compute_in_half_(model: nn.Module, dtype: torch.dtype) -> None:
    """Let 4-bit layers that a folder says compute in float32 multiply in ``dtype``, if that is a half precision.

    float32 is what transformers writes where nobody chose, and on a GPU ten times slower.
    """
    if dtype not in HALF:
        return
    layers: list[Any] = [module for module in model.modules() if base_weight.is_4bit(module)]
    changed = [layer for layer in layers if base_weight.compute_dtype(layer, dtype) is torch.float32]
    for layer in changed:
        layer.compute_dtype = dtype
    if changed:
        half = str(dtype).removeprefix("torch.")
        rank_zero_info(
            f"{len(changed)} 4-bit layers are stored to compute in float32, transformers' default: here in {half}"
        )


@cache
def _prepared(kind: Any, forward: Any) -> type:
    return type(kind.__name__, (_Prepared, kind), {"forward": forward})


def _forward_8bit(self: Any, x: Tensor) -> Tensor:
    return quantized_linear(x, self)


def _forward_4bit(self: Any, x: Tensor) -> Tensor:
    """As ``bitsandbytes.nn.Linear4bit`` computes, with its kernels; under autocast as ``F.linear`` does."""
    autocast = autocast_dtype(x)
    dtype = autocast or base_weight.compute_dtype(self, x.dtype)
    bias = None if self.bias is None else self.bias.to(dtype)
    state = base_weight.quant_state(self)
    out = base_weight.bitsandbytes().matmul_4bit(x.to(dtype), self.weight, bias=bias, quant_state=state)
    return out.to(autocast or x.dtype)


def _check_blocks(name: str, module: nn.Module) -> None:
    layer: Any = module
    state = base_weight.quant_state(layer)
    computes = layer.weight.device.type == "cpu" and not isinstance(layer.weight, FakeTensor)
    if state is not None and computes and layer.in_features % state.blocksize:
        raise ValueError(
            f"block_size {state.blocksize} does not divide the {layer.in_features} inputs of {name}, which "
            "bitsandbytes computes wrongly on a CPU: take a smaller block_size (32 is the smallest), or add the layer "
            "to quantization.skip_modules"
        )
