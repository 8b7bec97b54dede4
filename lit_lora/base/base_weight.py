"""The frozen weight of a linear layer as ``(out_features, in_features)``, whatever holds it.

The one file that knows how bitsandbytes and transformers' ``Conv1D`` store a weight; ``quantize.py`` makes such layers.
Neither package is imported on top: a model that holds one of their layers has imported them already, so their classes
are looked up among the loaded modules. PEFT has one copy of the adapter per kind of storage; here the forward is one
and only this file differs.
"""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lit_lora.kernels.cuda_stand_ins import is_on_cuda
from lit_lora.kernels.cuda_way import HALF
from lit_lora.kernels.made_again import after

# On import bitsandbytes 0.50 warns that it cannot load an optional kernel, which nothing here uses: an inference kernel
# of lower precision.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))


SCALES = "quant_absmax"
"""Parameter of a 4-bit layer whose weight is held plainly: the scales of its blocks."""


def is_linear_like(module: nn.Module) -> bool:
    """Whether a linear adapter can wrap this layer.

    ``nn.MultiheadAttention`` reads the weight of its output projection without calling it, so an adapter around that
    layer would never run: it does not count. Neither does a class of linear layer that gives something else than the
    product of its one input, such as the routers of some mixtures of experts.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward or may_be_quantized(module):
        return isinstance(module, nn.Linear) or is_conv1d(module)
    return _gives_rows(module)


@torch.no_grad()
def _gives_rows(module: nn.Linear) -> bool:
    x = torch.zeros(2, module.in_features, device=module.weight.device, dtype=module.weight.dtype)
    try:
        result = module(x)
    except Exception:  # whatever it needs instead
        return False
    return isinstance(result, Tensor) and result.shape == (2, module.out_features)


def is_conv1d(module: Any) -> bool:
    """Whether this is GPT-2's linear layer, which stores its weight transposed."""
    return _is_instance(module, "transformers.pytorch_utils", "Conv1D")


def is_quantized(module: Any) -> bool:
    """Whether the weight is stored in 4 or 8 bits, so that it can be read but not written."""
    if is_4bit(module):
        return quant_state(module) is not None
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
    return is_4bit(module) or _is_8bit(module)


def is_4bit(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' 4-bit layer."""
    return _is_instance(module, "bitsandbytes.nn.modules", "Linear4bit")


def linear_shape(module: Any) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear-like layer."""
    if is_conv1d(module):
        num_in, num_out = module.weight.shape
        return int(num_out), int(num_in)
    assert isinstance(module, nn.Linear), f"not linear-like: {type(module).__name__}"
    return module.out_features, module.in_features


def compute_dtype(module: Any, input_dtype: torch.dtype) -> torch.dtype:
    """dtype of the layer's product for an input of this dtype: 4-bit layers may have one of their own."""
    if is_4bit(module):
        if module.compute_type_is_set and module.compute_dtype is not None:
            return module.compute_dtype
        return input_dtype
    if is_quantized(module):
        return input_dtype
    return module.weight.dtype


_FEW_ROWS = 32


def has_kernel_for(module: Any, x: Tensor) -> bool:
    """Whether the layer's own forward multiplies by 4-bit codes as they are: CUDA, few rows, nothing to differentiate.

    A token that is generated then reads half a byte of each weight; dequantized first, the weight is also written and
    read again, in 16 bits. On a CPU bitsandbytes dequantizes too, more slowly than here.
    """
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.is_cuda and not torch.is_grad_enabled() and rows <= _FEW_ROWS and is_4bit(module)


def rounds_products(module: nn.Module) -> bool:
    """Whether the layer multiplies in half precision, or with inputs of 8 bits: equal rows then differ by rounding."""
    if not is_linear_like(module):
        return False
    return _is_8bit(module) or compute_dtype(module, torch.float32) in HALF


def read_weight(module: Any, dtype: torch.dtype | None = None, *, gradient: Tensor | None = None) -> Tensor:
    """The weight as ``(out_features, in_features)``, dequantized if need be.

    Args:
        module: a linear-like layer.
        dtype: what to convert to; by default the dtype it is stored in, or was quantized from.
        gradient: in a backward pass, one that is at hand: a compiler then dequantizes again instead of keeping the
            weight since the forward pass.

    Returns:
        The weight itself or a view of it where that is possible, else a new tensor. Not to be written to.
    """
    if is_quantized(module):
        again = gradient is not None and torch.compiler.is_compiling()
        if is_4bit(module):
            state = quant_state(module)
            if again:
                state.absmax = after(state.absmax, gradient)
            weight = dequantize_4bit(module.weight.data, state)
            return weight if dtype is None else weight.to(dtype)
        codes, scales = _scales_8bit(module)
        scales = after(scales, gradient) if again else scales
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


def unpack_(module: Any) -> None:
    """Bring a 4-bit weight back that bitsandbytes repacked for AVX512-BF16, a layout without a backward.

    It does so in an eval forward of its own.
    """
    state = quant_state(module)
    if state is not None and getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
            module.weight.data, state
        )


def hold_plainly_(module: Any) -> None:
    """Keep a quantized weight in plain frozen parameters, which can be divided among processes; others are left alone.

    bitsandbytes' own parameters lose their class, and with it their scales, when shards of them are put together
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1424). The codes become the layer's plain weight,
    the scales of 4-bit blocks a parameter beside it, and what is small stays on the layer.
    """
    if not is_quantized(module) or is_held_plainly(module):
        return
    if is_4bit(module):
        unpack_(module)
        state = copy.copy(quant_state(module))
        module.weight = _plain(module.weight)
        module.register_parameter(SCALES, _plain(state.absmax))
        state.absmax = None
        module.quant_state = state
    else:
        codes, scales = _scales_8bit(module)
        module.weight = _plain(codes)
        module.state.CB, module.state.SCB = None, scales


def state_tensors(module: Any) -> list[Tensor]:
    """What a quantized layer holds beside its parameters, to read its weight by."""
    if not may_be_quantized(module) or not is_quantized(module):
        return []
    if not is_4bit(module):
        return [_scales_8bit(module)[1]]
    return [value for value in quant_state(module).as_dict().values() if isinstance(value, Tensor)]


def is_held_plainly(module: Any) -> bool:
    """Whether :func:`hold_plainly_` was here."""
    if is_4bit(module):
        return hasattr(module, SCALES)
    return _is_8bit(module) and module.state.CB is None and getattr(module.weight, "SCB", None) is None


def _plain(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().as_subclass(Tensor), requires_grad=False)


def quant_state(module: Any) -> Any:
    """The block scales: bitsandbytes keeps them on the weight, and on the layer too in case the weight is rebuilt."""
    state = getattr(module.weight, "quant_state", None)
    state = module.quant_state if state is None else state
    held = getattr(module, SCALES, None)
    if held is None:
        return state
    state = copy.copy(state)
    state.absmax = held.data
    return state


def bitsandbytes() -> Any:
    """The package.

    Raises:
        ImportError: saying what to do, if it is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ImportError(
            "a quantized base needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave out "
            "model.quantization"
        ) from error
    return bnb


_HAS_VECTOR_KERNEL = torch.backends.cpu.get_cpu_capability() == "AVX512"


def dequantize_4bit(codes: Tensor, state: Any) -> Tensor:
    """bitsandbytes (0.50) has a vector kernel for CPUs with AVX512; lookups are far faster than its scalar code.

    Lookups can go when it has more: https://github.com/bitsandbytes-foundation/bitsandbytes/pull/2072.
    """
    if codes.device.type == "cpu" and not is_on_cuda(codes) and not _HAS_VECTOR_KERNEL:
        return look_up_4bit(codes, state)
    return bitsandbytes().functional.dequantize_4bit(codes, state)


def look_up_4bit(codes: Tensor, state: Any) -> Tensor:
    """``bitsandbytes.functional.dequantize_4bit`` bit for bit, by table lookup.

    A byte holds two codes, the first in its high half: one lookup of 8 bytes gives both float32 values.
    """
    scales = state.absmax
    if state.nested:
        scales = bitsandbytes().functional.dequantize_blockwise(scales, state.state2) + state.offset
    num, block_size = torch.Size(state.shape).numel(), state.blocksize
    values = state.code.float()
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1).view(torch.int64).squeeze(1)
    indices = codes.reshape(-1).view(torch.uint8).int()
    weight = pairs.index_select(0, indices).view(torch.float32)[:num]
    whole = num - num % block_size
    weight[:whole].view(-1, block_size).mul_(scales.float()[: whole // block_size, None])
    weight[whole:].mul_(scales[-1])
    return weight.view(state.shape).to(state.dtype)


def num_weights(model: nn.Module) -> int:
    """How many weights the parameters of a model stand for; two 4-bit weights share a byte, and scales are none."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            quantized = name == "weight" and is_4bit(module) and is_quantized(module)
            shape = quant_state(module).shape if quantized else parameter.shape
            counts[id(parameter)] = 0 if name == SCALES else torch.Size(shape).numel()
    return sum(counts.values())


def _is_instance(module: Any, module_name: str, class_name: str) -> bool:
    loaded = sys.modules.get(module_name)
    return loaded is not None and isinstance(module, getattr(loaded, class_name, ()))


def _is_8bit(module: nn.Module) -> bool:
    return _is_instance(module, "bitsandbytes.nn.modules", "Linear8bitLt")


def _scales_8bit(module: Any) -> tuple[Tensor, Any]:
    """Codes and row scales of an 8-bit layer; they move from the weight to ``state`` in the first forward."""
    if module.state.CB is not None:
        return module.state.CB, module.state.SCB
    scales = getattr(module.weight, "SCB", None)
    return module.weight.data, module.state.SCB if scales is None else scales
