"""A checksum inside of an adapter's weights file, over the tensors and over what the config says about their use.

Safetensors itself notices a damaged header, not a flipped bit in a tensor or in ``lora_alpha``. The checksum lies in
the file's metadata, where PEFT, transformers and vLLM pass over it. Adapters of other writers have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lit_lora.config import LoRAConfig

METADATA_KEY = "lit_lora_sha256"
_WITHOUT_EFFECT = ("lora_dropout", "init_lora_weights", "eva_rho", "freeze_A")
"""Fields that a loaded adapter computes the same without."""

_FIRST = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "adapter_dtype",
)  # fmt: skip
"""Fields of the first version: they count also at their defaults; each later one only where it is set, so that adapters
of earlier versions keep their checksums."""


def adapter_checksum(tensors: Mapping[str, Tensor], config: LoRAConfig) -> str:
    """SHA-256 over names, dtypes, shapes and values of the tensors, and the config as far as it changes the function.

    Args:
        tensors: as they are in the file.
        config: as it is read from the file beside it.
    """
    unset = asdict(LoRAConfig())
    fields = {
        name: value
        for name, value in asdict(config).items()
        if name in _FIRST or (name not in _WITHOUT_EFFECT and value != unset[name])
    }
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def serialize(tensors: dict[str, Tensor], config: LoRAConfig, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with the checksum; equal content gives equal bytes.

    Safetensors writes metadata in random order, so the header is put in order here.

    Args:
        tensors: as they are to be in the file.
        config: as it is read from the file beside it.
        metadata: what else the header says.
    """
    data = save(tensors, metadata={"format": "pt", **metadata, METADATA_KEY: adapter_checksum(tensors, config)})
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(ordered) == size, "the header changed its length"
    return data[:8] + ordered + data[8 + size :]


def check_adapter(path: Path, tensors: Mapping[str, Tensor], config: LoRAConfig) -> None:
    """Check what was read against the checksum in the file, where there is one.

    Raises:
        ValueError: if weights or config are not what was written.
    """
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get(METADATA_KEY)
    if expected is not None and adapter_checksum(tensors, config) != expected:
        raise ValueError(
            f"{path.parent} is damaged: its weights or its config are not what was written (the checksum differs). "
            "Take an undamaged copy; if you edited it on purpose, load it with PEFT and save it again"
        )
