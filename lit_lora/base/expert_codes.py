"""Quantize the fused experts of a model: one parameter at a time, also while transformers loads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from lit_lora.base.base_weight import bitsandbytes
from lit_lora.base.int8_rows import quantize_rows
from lit_lora.base.left_plain import is_left_plain
from lit_lora.base.quantized_experts import Codes, QuantizedExperts
from lit_lora.config import QuantizationConfig


def is_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter is one of fused experts: of three dimensions, and of no layer of torch's own."""
    return (
        parameter.ndim == 3
        and min(parameter.shape) > 1
        and parameter.is_floating_point()
        and not type(module).__module__.startswith("torch.")
    )


def quantize_experts_(name: str, module: nn.Module, quantization: QuantizationConfig) -> None:
    """Quantize the fused experts that a module has itself, in place.

    Args:
        name: of the module in its model.
        module: with values.
        quantization: how.
    """
    for key, parameter in list(module.named_parameters(recurse=False)):
        if _is_wanted(f"{name}.{key}", module, parameter, quantization):
            module.register_parameter(key, _quantized(parameter, quantization))


def dequantize_experts_(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn the experts that a module has itself back into plain parameters, in place."""
    for key, parameter in list(module.named_parameters(recurse=False)):
        if isinstance(parameter, QuantizedExperts):
            values = parameter.values().to(dtype or parameter.held.dtype)
            module.register_parameter(key, nn.Parameter(values, requires_grad=False))


@contextmanager
def quantized_while_loading(quantization: QuantizationConfig) -> Iterator[None]:
    """Within, a model that transformers loads gets its fused experts quantized, each parameter as soon as it is read.

    transformers quantizes linear layers only. It sets one parameter after another, and torch asks here about each.
    """
    parents: dict[int, tuple[int, str]] = {}

    def note(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            parents[id(child)] = (id(parent), name)

    def name_of(module: nn.Module) -> str:
        names, key = [], id(module)
        while key in parents:
            key, name = parents[key]
            names.append(name)
        return ".".join(reversed(names))

    def quantize(module: nn.Module, key: str, parameter: Any) -> Any:
        if parameter.is_meta or not _is_wanted(f"{name_of(module)}.{key}", module, parameter, quantization):
            return None
        made: Any = _quantized(parameter, quantization)
        if hasattr(parameter, "_is_hf_initialized"):  # by which transformers knows what it must not start anew
            made._is_hf_initialized = parameter._is_hf_initialized
        return made

    hooks = [
        register_module_module_registration_hook(note),
        register_module_parameter_registration_hook(quantize),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_wanted(name: str, module: nn.Module, parameter: Tensor, quantization: QuantizationConfig) -> bool:
    if isinstance(parameter, QuantizedExperts) or not is_experts(module, parameter):
        return False
    return not is_left_plain(name, quantization)


@torch.no_grad()
def _quantized(parameter: Tensor, quantization: QuantizationConfig) -> nn.Parameter:
    weight = parameter.detach()
    num_experts, rows, columns = weight.shape
    if quantization.bits == 8:
        codes, scales = quantize_rows(weight.flatten(0, 1))
        held = Codes(
            codes.view(weight.shape), scales.view(num_experts, rows), None, None, "int8", columns, weight.dtype,
            (rows, columns),
        )  # fmt: skip
    else:
        made = [_codes_4bit(matrix, quantization) for matrix in weight]
        stacked: Any = {name: torch.stack([getattr(one, name) for one in made]) for name in made[0].tensors}
        held = made[0]._replace(**stacked)
    return nn.Parameter(QuantizedExperts(held, weight.dtype), requires_grad=False)


def _codes_4bit(matrix: Tensor, quantization: QuantizationConfig) -> Codes:
    with unset_fake_temporarily():
        bitsandbytes().functional.quantize_blockwise(torch.zeros(1))  # fills its table, which must not be a fake one
    codes, state = bitsandbytes().functional.quantize_4bit(
        matrix.contiguous(),
        blocksize=quantization.block_size,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.quant_type,
    )
    nested = state.state2 if state.nested else None
    rows, columns = matrix.shape
    return Codes(
        codes, state.absmax, None if nested is None else nested.absmax, state.offset if state.nested else None,
        quantization.quant_type, quantization.block_size, matrix.dtype, (rows, columns),
    )  # fmt: skip
