"""A checksum of a tensor's bits that is computed where the tensor lies, without copying it.

Two sums over the tensor's bytes read as integers, modulo 2**64: a plain one, which any single change alters, and one
weighted by position, which a swap alters. Not cryptographic: it finds accidents. Both sums are exact and independent of
the order of addition, so that a CPU and a GPU agree.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_lora.base import base_weight
from lit_lora.base.base_weight import SCALES
from lit_lora.base.quantized_experts import QuantizedExperts

_CPU_CHUNK = 2**16  # elements; the int64 copy of a chunk stays in the cache
_DEVICE_CHUNK = 2**22  # elements; few kernels, and a copy of 32 MiB


def checksum(tensor: Tensor) -> Tensor:
    """Checksum of the bits of ``tensor``, ``(2,)`` int64 on its device. Does not wait for the device.

    Of a tensor that is divided among processes, this process's part of the two sums.
    """
    local, start = _share(tensor.detach())
    return share_of_checksum(local, start, tensor)


def share_of_checksum(share: Tensor, start: int, whole: Tensor) -> Tensor:
    """What a part of a tensor contributes to its checksum.

    Args:
        share: of the tensor, contiguous.
        start: number of elements before it.
        whole: the tensor, of which the size and the type count.
    """
    flat = share.reshape(-1)
    start_byte, in_words = start * flat.element_size(), _reads_words(whole)
    if in_words and (start_byte % 4 or flat.numel() * flat.element_size() % 4):
        return _sums(flat.view(torch.uint8), start_byte, bytes_of_words=True)
    return _sums(_as_integers(flat) if in_words else flat.view(torch.uint8), start_byte // (4 if in_words else 1))


def _sums(words: Tensor, offset: int, *, bytes_of_words: bool = False) -> Tensor:
    """The two sums of integers, of which the first is number ``offset``; of bytes, as parts of their words."""
    result = torch.zeros(2, dtype=torch.int64, device=words.device)
    size = _CPU_CHUNK if words.device.type == "cpu" else _DEVICE_CHUNK
    weights = torch.arange(min(size, words.numel()), device=words.device)
    for start in range(0, words.numel(), size):
        chunk = words[start : start + size].to(torch.int64)
        if bytes_of_words:
            places = weights[: chunk.numel()] + (offset + start)
            chunk = _as_parts(chunk, places % 4)
            result[0] += chunk.sum()
            result[1] += chunk.mul_(places // 4).sum()
            continue
        plain = chunk.sum()
        result[0] += plain
        result[1] += chunk.mul_(weights[: chunk.numel()]).sum() + plain * (start + offset)
    return result


def _as_parts(values: Tensor, places: Tensor) -> Tensor:
    """What bytes contribute to the signed, little-endian words of four that they are in."""
    parts = values << (8 * places)
    return parts - ((places == 3) & (values >= 128)) * 2**32


def _share(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process holds of a tensor, and the number of elements before that."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    first = min(rows, mesh.get_local_rank() * -(-rows // mesh.size()))
    return tensor.to_local(), first * (tensor.numel() // rows if rows else 0)


def checksums(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Checksums of many tensors as numbers; one wait for the device at the end.

    Of tensors that are divided among processes, the checksums of the whole: every process must ask.
    """
    listed = list(tensors)
    sums = [checksum(tensor) for tensor in listed]
    if not sums:
        return []
    stacked = torch.stack([each.to(sums[0].device) for each in sums])
    divided = [index for index, tensor in enumerate(listed) if isinstance(tensor, DTensor)]
    if divided:
        mesh = next(tensor.device_mesh for tensor in listed if isinstance(tensor, DTensor))
        parts = stacked[divided].to(mesh.device_type)
        dist.all_reduce(parts, group=mesh.get_group())
        stacked[divided] = parts.to(stacked.device)
    return [(plain, weighted) for plain, weighted in stacked.tolist()]


def stored_tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors that hold a parameter of ``module``: itself, and for bitsandbytes' weights the scales beside it.

    Those move: from the weight to the layer's state in the first forward of an 8-bit layer, and from the layer to a
    weight that was rebuilt. Their names here stay the same.
    """
    parameter = module.get_parameter(name)
    if name == SCALES:  # named as the weight's
        return {}
    if isinstance(parameter, QuantizedExperts):
        return {f"{name}.{key}": tensor for key, tensor in parameter.held.tensors.items()}
    held = {name: parameter.detach()}
    owned = name == "weight"
    quant_state = getattr(parameter, "quant_state", None)  # bitsandbytes' Params4bit
    if quant_state is None and owned:
        quant_state = getattr(module, "quant_state", None)
    if quant_state is not None and SCALES in dict(module.named_parameters(recurse=False)):
        quant_state = base_weight.quant_state(module)
    if quant_state is not None:
        for key, value in quant_state.as_dict().items():
            if isinstance(value, Tensor):
                held[f"{name}.{key}"] = value
    scales = getattr(parameter, "SCB", None)  # bitsandbytes' Int8Params
    if scales is None and owned:
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scales, Tensor):
        held[f"{name}.SCB"] = scales
    return held


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Everything that training must leave as it is: parameters without gradient, and buffers that a checkpoint holds.

    Buffers beside a trainable parameter (a trained batch norm's statistics) belong to what is trained.
    """
    frozen: dict[str, Tensor] = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        own = dict(child.named_parameters(recurse=False))
        for name, parameter in own.items():
            if not parameter.requires_grad:
                frozen.update({prefix + key: tensor for key, tensor in stored_tensors(child, name).items()})
        if not any(parameter.requires_grad for parameter in own.values()):
            for name, buffer in child.named_buffers(recurse=False):
                if name not in child._non_persistent_buffers_set:  # caches such as rotary frequencies come and go
                    frozen[prefix + name] = buffer
    return frozen


def _reads_words(tensor: Tensor) -> bool:
    return tensor.dtype != torch.bool and tensor.numel() * tensor.element_size() % 4 == 0


def _as_integers(flat: Tensor) -> Tensor:
    if flat.storage_offset() * flat.element_size() % 4:  # a slice that no int32 can begin at
        flat = flat.clone()
    return flat.view(torch.int32)
