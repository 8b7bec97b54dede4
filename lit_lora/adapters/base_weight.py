"""The frozen weight of a linear layer as ``(out_features, in_features)``, whatever holds it.

The one file that knows bitsandbytes and transformers' ``Conv1D``. Neither is imported here: a model that holds one of
their layers has imported them already, so their classes are looked up among the loaded modules. PEFT has one copy of
the adapter per kind of storage; here the forward is one and only this file differs.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lit_lora.config import QuantizationConfig


def is_linear_like(module: nn.Module) -> bool:
    """Whether a linear adapter can wrap this layer.

    ``nn.MultiheadAttention`` reads the weight of its output projection without calling it, so an adapter around that
    layer would never run: it does not count.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: Any) -> bool:
    """Whether this is GPT-2's linear layer, which stores its weight transposed."""
    return _is_instance(module, "transformers.pytorch_utils", "Conv1D")


def is_quantized(module: Any) -> bool:
    """Whether the weight is stored in 4 or 8 bits, so that it can be read but not written."""
    if _is_4bit(module):
        return _quant_state(module) is not None
    return _is_8bit(module) and not module.state.has_fp16_weights and _scales_8bit(module)[1] is not None


def is_known_product(module: nn.Module) -> bool:
    """Whether the layer's class does exactly ``F.linear`` on :func:`read_weight`: a subclass may do anything."""
    return type(module) is nn.Linear or is_conv1d(module) or may_be_quantized(module)


def is_intercepted(module: nn.Module) -> bool:
    """Whether a hook or a patched ``forward`` waits for this layer to be called."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def may_be_quantized(module: nn.Module) -> bool:
    """Whether the layer's class is one that :func:`is_quantized` can be true for."""
    return _is_4bit(module) or _is_8bit(module)


def linear_shape(module: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear-like layer."""
    if is_conv1d(module):
        num_in, num_out = module.weight.shape
        return int(num_out), int(num_in)
    assert isinstance(module, nn.Linear), f"not linear-like: {type(module).__name__}"
    return module.out_features, module.in_features


def compute_dtype(module: Any, input_dtype: torch.dtype) -> torch.dtype:
    """dtype of the layer's product for an input of this dtype: 4-bit layers may have one of their own."""
    if _is_4bit(module):
        if module.compute_type_is_set and module.compute_dtype is not None:
            return module.compute_dtype
        return input_dtype
    if is_quantized(module):
        return input_dtype
    return module.weight.dtype


def read_weight(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as ``(out_features, in_features)``, dequantized if need be.

    Args:
        module: a linear-like layer.
        dtype: what to convert to; by default the dtype it is stored in, or was quantized from.

    Returns:
        The weight itself or a view of it where that is possible, else a new tensor. Not to be written to.
    """
    if is_quantized(module):
        if _is_4bit(module):
            import bitsandbytes as bnb

            weight = bnb.functional.dequantize_4bit(module.weight.data, _quant_state(module))
            return weight if dtype is None else weight.to(dtype)
        codes, scales = _scales_8bit(module)
        # LLM.int8 (arXiv:2208.07339), eq. 4: rows scaled to [-127, 127]; the same operations as bitsandbytes' own.
        return codes.to(dtype or scales.dtype, copy=True).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
    weight = module.weight.t() if is_conv1d(module) else module.weight
    return weight if dtype is None else weight.to(dtype)


def write_weight_(module: Any, weight: Tensor) -> None:
    """Give the layer a new weight, ``(out_features, in_features)``, in the dtype of the old one.

    The layer gets a new parameter: a layer that was tied to the old one keeps the old values.

    Raises:
        ValueError: if the layer is quantized.
    """
    if is_quantized(module):
        raise ValueError(f"cannot write the weight of a quantized {type(module).__name__}")
    old = module.weight
    weight = weight.t().contiguous() if is_conv1d(module) else weight
    module.weight = nn.Parameter(weight.to(old.dtype), requires_grad=old.requires_grad)


def prepare_base_layer(module: Any) -> None:
    """Undo what bitsandbytes does on its own on hosts with AVX512-BF16, where an eval forward repacks 4-bit weights.

    The repacked layout has no backward, and the layer would keep it in training. bitsandbytes has no public switch
    for this (0.50); it can go when it has one.
    """
    if not _is_4bit(module):
        return
    module.support_avx512bf16_for_cpu = False
    state = _quant_state(module)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            module.weight.data, state
        )


def transformers_quantization_config(quantization: QuantizationConfig, dtype: torch.dtype) -> Any:
    """The ``BitsAndBytesConfig`` for loading a model in 4 or 8 bits; ``dtype`` is what "auto" computes in.

    Raises:
        ValueError: for what transformers cannot do while loading.
    """
    from transformers import BitsAndBytesConfig

    _refuse_8bit_embedding(quantization)
    skip = quantization.skip_modules
    if skip is not None:  # transformers leaves the head alone only where nothing is named
        skip = [*skip, *(head for head in _HEADS if head not in skip)]
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    if quantization.block_size != 64:
        raise ValueError(f"transformers loads 4-bit models with block_size 64 only, got {quantization.block_size}")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=_compute_dtype(quantization, dtype),
        llm_int8_skip_modules=skip,
    )


def quantize_(model: nn.Module, quantization: QuantizationConfig) -> None:
    """Quantize the linear layers of a model that is in memory, in place, all but the output head."""
    import bitsandbytes as bnb

    _refuse_8bit_embedding(quantization)
    int8: Any = bnb.nn.Int8Params
    int4: Any = bnb.nn.Params4bit
    keep = {*_HEADS, *(quantization.skip_modules or [])}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or any(name == k or name.endswith(f".{k}") for k in keep):
            continue
        num_in, num_out, has_bias = module.in_features, module.out_features, module.bias is not None
        weight, device = module.weight.detach(), module.weight.device
        layer: Any
        if isinstance(weight, FakeTensor):
            layer = _fake_quantized_layer(weight, quantization)
        elif quantization.bits == 8:
            layer = bnb.nn.Linear8bitLt(num_in, num_out, has_bias, has_fp16_weights=False, threshold=6.0, device="meta")
            # Int8Params quantizes only on the way from the CPU.
            layer.weight = int8(weight.cpu(), requires_grad=False).to(device)
        else:
            layer = bnb.nn.Linear4bit(
                num_in, num_out, has_bias, _compute_dtype(quantization, weight.dtype), device="meta"
            )
            layer.weight = int4(
                weight,
                requires_grad=False,
                compress_statistics=quantization.double_quant,
                quant_type=quantization.quant_type,
                blocksize=quantization.block_size,
                module=layer,
            ).to(device)
        layer.bias = module.bias
        prepare_base_layer(layer)
        model.set_submodule(name, layer.train(module.training))


def _fake_quantized_layer(weight: Tensor, quantization: QuantizationConfig) -> Any:
    """A quantized layer whose tensors have sizes but no memory, to trace a step with; see ``memory.py``.

    bitsandbytes' own functions make its tensors. Only its parameter classes are left out: a fake tensor can be no
    instance of them (0.50).
    """
    import bitsandbytes as bnb

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


_HEADS = ("lm_head", "embed_out", "output_projection")
"""What transformers' models call their output head."""


def _compute_dtype(quantization: QuantizationConfig, dtype: torch.dtype) -> torch.dtype:
    return dtype if quantization.compute_dtype == "auto" else getattr(torch, quantization.compute_dtype)


def _refuse_8bit_embedding(quantization: QuantizationConfig) -> None:
    if quantization.embedding_bits is not None:
        raise ValueError("embedding_bits is not implemented: leave it out")


def num_elements(parameter: Tensor) -> int:
    """How many weights a parameter stands for; two 4-bit weights share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def _is_instance(module: Any, module_name: str, class_name: str) -> bool:
    loaded = sys.modules.get(module_name)
    return loaded is not None and isinstance(module, getattr(loaded, class_name, ()))


def _is_4bit(module: nn.Module) -> bool:
    return _is_instance(module, "bitsandbytes.nn.modules", "Linear4bit")


def _is_8bit(module: nn.Module) -> bool:
    return _is_instance(module, "bitsandbytes.nn.modules", "Linear8bitLt")


def _quant_state(module: Any) -> Any:
    """The block scales: bitsandbytes keeps them on the weight, and on the layer too in case the weight is rebuilt."""
    state = getattr(module.weight, "quant_state", None)
    return module.quant_state if state is None else state


def _scales_8bit(module: Any) -> tuple[Tensor, Any]:
    """Codes and row scales of an 8-bit layer; they move from the weight to ``state`` in the first forward."""
    if module.state.CB is not None:
        return module.state.CB, module.state.SCB
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data, scales
