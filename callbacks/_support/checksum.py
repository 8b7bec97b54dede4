"""A checksum of a tensor's bits that is computed where the tensor lies, without copying it.

Two sums over the tensor's bytes read as integers, modulo 2**64: a plain one, which any single change alters, and one
weighted by position, which a swap alters. Not cryptographic: it finds accidents. Both sums are exact and independent of
the order of addition, so that a CPU and a GPU agree.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_CPU_CHUNK = 2**16  # elements; the int64 copy of a chunk stays in the cache
_DEVICE_CHUNK = 2**22  # elements; few kernels, and a copy of 32 MiB


def checksum(tensor: Tensor) -> Tensor:
    """Checksum of the bits of ``tensor``, ``(2,)`` int64 on its device. Does not wait for the device."""
    flat = tensor.detach().reshape(-1)
    words = _as_integers(flat)
    result = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    size = _CPU_CHUNK if tensor.device.type == "cpu" else _DEVICE_CHUNK
    weights = torch.arange(min(size, words.numel()), device=tensor.device)
    for start in range(0, words.numel(), size):
        chunk = words[start : start + size].to(torch.int64)
        plain = chunk.sum()
        result[0] += plain
        result[1] += chunk.mul_(weights[: chunk.numel()]).sum() + plain * start
    return result


def checksums(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Checksums of many tensors as numbers; one wait for the device at the end."""
    sums = [checksum(tensor) for tensor in tensors]
    if not sums:
        return []
    return [(plain, weighted) for plain, weighted in torch.stack([s.to(sums[0].device) for s in sums]).tolist()]


def stored_tensors(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors that hold a parameter of ``module``: itself, and for bitsandbytes' weights the scales beside it.

    Those move: from the weight to the layer's state in the first forward of an 8-bit layer, and from the layer to a
    weight that was rebuilt. Their names here stay the same.
    """
    parameter = module.get_parameter(name)
    held = {name: parameter.detach()}
    owned = name == "weight"
    quant_state = getattr(parameter, "quant_state", None)  # bitsandbytes' Params4bit
    if quant_state is None and owned:
        quant_state = getattr(module, "quant_state", None)
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


def _as_integers(flat: Tensor) -> Tensor:
    if flat.dtype == torch.bool or flat.numel() * flat.element_size() % 4:
        return flat.view(torch.uint8)
    if flat.storage_offset() * flat.element_size() % 4:  # a slice that no int32 can begin at
        flat = flat.clone()
    return flat.view(torch.int32)
