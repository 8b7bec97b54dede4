"""Quantize the linear layers of a model, and turn them back.

The quantized weight is frozen: nothing here is differentiated. What computes with it is ``base_weight.read_weight``.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from lit_lora.base.base_weight import (
    bitsandbytes,
    is_conv1d,
    is_linear_like,
    is_quantized,
    may_be_quantized,
    read_weight,
)
from lit_lora.base.expert_codes import dequantize_experts_, is_experts, quantize_experts_
from lit_lora.base.int8_rows import Int8Embedding, Int8Head, quantize_embeddings_
from lit_lora.base.left_plain import HEADS, is_left_plain, is_named_by
from lit_lora.base.quantized_forward import prepare_base_layer
from lit_lora.config import QuantizationConfig


def transformers_quantization_config(quantization: QuantizationConfig, dtype: torch.dtype) -> Any:
    """The ``BitsAndBytesConfig`` for loading a model in 4 or 8 bits; ``dtype`` is what "auto" computes in.

    None where transformers cannot load it so: load it plainly then, and call :func:`quantize_`.
    """
    from transformers import BitsAndBytesConfig

    bitsandbytes()
    skip: list[str] | None = None  # transformers then leaves the head alone, but only then
    if quantization.skip_modules is not None:
        skip = [rf"(?:.*\.)?{re.escape(entry)}" for entry in quantization.skip_modules] + list(HEADS)
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    if quantization.block_size != 64:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=_compute_dtype(quantization, dtype),
        llm_int8_skip_modules=skip,
    )


def quantize_(model: nn.Module, quantization: QuantizationConfig, *, experts: bool = True) -> None:
    """Quantize the linear layers of a model that is in memory, in place, all but the output head, and fused experts.

    Args:
        model: with its weights.
        quantization: how.
        experts: fused experts too.

    Raises:
        ValueError: if a layer cannot be quantized, or an entry of ``skip_modules`` matches nothing.
        ImportError: if bitsandbytes is not installed.
    """
    bitsandbytes()
    for name, module in list(model.named_modules()):
        if is_linear_like(module) and not may_be_quantized(module) and not is_left_plain(name, quantization):
            model.set_submodule(name, quantized_layer(name, module, quantization))
    finish_quantization_(model, quantization, experts=experts)


def finish_quantization_(model: Any, quantization: QuantizationConfig, *, experts: bool = True) -> None:
    """What is the same whoever quantized the linear layers: fused experts, embedding and head, and the checks.

    Args:
        model: with quantized layers.
        quantization: how.
        experts: quantize fused experts that are not yet; else there must be none to quantize.

    Raises:
        ValueError: if no layer is quantized, one is passed over, experts are left, blocks run over the ends of rows, or
            an entry of ``skip_modules`` matches nothing.
    """
    check_skipped(model, quantization)
    quantized = {name: module for name, module in model.named_modules() if may_be_quantized(module)}
    if not quantized:
        raise ValueError("no layer was quantized: the model has no linear layer apart from the head and skip_modules")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        plain = is_linear_like(module) and not may_be_quantized(module) and module is not head
        if plain and not is_left_plain(name, quantization):
            raise ValueError(_cannot_be_quantized(name, module))
    if experts:
        for name, module in model.named_modules():
            quantize_experts_(name, module, quantization)
    else:
        _check_no_experts(model, quantization)
    for name, module in quantized.items():
        prepare_base_layer(name, module)
    if quantization.embedding_bits is not None:
        quantize_embeddings_(model)


def check_skipped(model: nn.Module, quantization: QuantizationConfig) -> None:
    """Check that every entry of ``skip_modules`` matches a module.

    Raises:
        ValueError: naming those that do not.
    """
    names = {name for name, _ in model.named_modules()}
    idle = [skip for skip in quantization.skip_modules or [] if not any(is_named_by(skip, name) for name in names)]
    if idle:
        raise ValueError(f"skip_modules {idle} match no module: leave them out")


def _check_no_experts(model: nn.Module, quantization: QuantizationConfig) -> None:
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if is_experts(module, parameter) and not is_left_plain(f"{name}.{key}", quantization):
                raise ValueError(
                    f"{name}.{key} holds fused experts, which cannot be quantized where the base is divided among "
                    f"processes: add {name.rpartition('.')[2]} to quantization.skip_modules"
                )


def quantized_layer(name: str, module: Any, quantization: QuantizationConfig) -> nn.Module:
    """A frozen bitsandbytes layer with the weight of this one.

    Raises:
        ValueError: if it is no plain linear layer.
    """
    bnb = bitsandbytes()
    if type(module) is not nn.Linear and not is_conv1d(module):
        raise ValueError(_cannot_be_quantized(name, module))
    weight, has_bias = read_weight(module).detach(), module.bias is not None
    (num_out, num_in), device = weight.shape, weight.device
    layer: Any
    if isinstance(weight, FakeTensor):
        layer = _fake_layer(weight, quantization)
    elif quantization.bits == 8:
        layer = bnb.nn.Linear8bitLt(num_in, num_out, has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
        # Int8Params quantizes only on the way from the CPU.
        layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False).to(device)
    else:
        layer = bnb.nn.Linear4bit(num_in, num_out, has_bias, _compute_dtype(quantization, weight.dtype), device="meta")
        layer.weight = bnb.nn.Params4bit(
            weight.contiguous(),
            requires_grad=False,
            compress_statistics=quantization.double_quant,
            quant_type=quantization.quant_type,
            blocksize=quantization.block_size,
            module=layer,
        ).to(device)
    layer.bias = module.bias
    layer.source_cls = type(module)  # as transformers notes it
    return layer.train(module.training)


def _cannot_be_quantized(name: str, module: nn.Module) -> str:
    return (
        f"{name} is a {type(module).__name__}, which cannot be quantized (nn.Linear and Conv1D can): "
        f"add it to quantization.skip_modules"
    )


def _fake_layer(weight: Tensor, quantization: QuantizationConfig) -> Any:
    """A quantized layer whose tensors have sizes but no memory, to trace a step with; see ``memory/traced_step.py``.

    bitsandbytes' own functions make its tensors. Only its parameter classes are left out: a fake tensor can be no
    instance of them (0.50).
    """
    bnb = bitsandbytes()
    num_out, num_in = weight.shape
    layer: Any
    with unset_fake_temporarily():
        bnb.functional.quantize_blockwise(torch.zeros(1))  # fills its table of codes, which must not be a fake one
        if quantization.bits == 8:
            layer = bnb.nn.Linear8bitLt(num_in, num_out, False, has_fp16_weights=False, threshold=6.0, device="meta")
        else:
            layer = bnb.nn.Linear4bit(num_in, num_out, False, _compute_dtype(quantization, weight.dtype), device="meta")
    if quantization.bits == 8:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.state.CB, layer.state.SCB = layer.weight.data, scales
        return layer
    packed, state = bnb.functional.quantize_4bit(
        weight,
        blocksize=quantization.block_size,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.quant_type,
    )
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.weight.quant_state = layer.quant_state = state
    return layer


def dequantize_(model: Any, dtype: torch.dtype | None = None) -> None:
    """Turn all that is quantized back into plain layers and experts with the weights that they compute with, in place.

    Args:
        model: any module; a transformers model then no longer counts as quantized.
        dtype: of the weights; by default the dtype that each was quantized from.
    """
    shared: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        dequantize_experts_(module, dtype)
        plain: Any
        if isinstance(module, (Int8Embedding, Int8Head)):
            if id(module.weight) not in shared:
                shared[id(module.weight)] = _frozen(torch.cat(list(module.blocks(dtype or module.dtype))))
            weight = shared[id(module.weight)]
            num_rows, num_columns = weight.shape
            if isinstance(module, Int8Embedding):
                plain = nn.Embedding(num_rows, num_columns, device="meta")
            else:
                plain = nn.Linear(num_columns, num_rows, bias=False, device="meta")
        elif may_be_quantized(module) and is_quantized(module):
            values = read_weight(module, dtype)
            if issubclass(vars(module).get("source_cls", nn.Linear), nn.Linear):
                plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            else:
                with torch.device("meta"):
                    plain = vars(module)["source_cls"](module.out_features, module.in_features)  # a Conv1D
                values = values.t().contiguous()
            plain.bias, weight = module.bias, _frozen(values)
        else:
            continue
        plain.weight = weight
        model.set_submodule(name, plain.train(module.training))
    forget_quantization(model)


def forget_quantization(model: Any) -> None:
    """Take the marks of a quantized model off a transformers model, which would refuse to save or train it."""
    model.hf_quantizer = None
    # Of a folder that was quantized already: save_pretrained would reverse them.
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [
            conversion
            for conversion in conversions
            if not any("bitsandbytes" in type(step).__module__ for step in getattr(conversion, "operations", ()))
        ]
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        if hasattr(model, name):
            setattr(model, name, False)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config


def _compute_dtype(quantization: QuantizationConfig, dtype: torch.dtype) -> torch.dtype:
    return dtype if quantization.compute_dtype == "auto" else getattr(torch, quantization.compute_dtype)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
