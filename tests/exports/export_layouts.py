"""What llama.cpp expects of each tensor, written a second time: row by row, from transformers' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by gguf's own reader."""
    return {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(path).tensors}


def architecture_of(path: Path) -> str:
    """What a file says that it is."""
    return gguf.GGUFReader(path).fields["general.architecture"].contents()


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder, by its name in the files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def as_in_gguf(tensors: dict[str, Tensor], architecture: str, config: Any) -> dict[str, Tensor]:
    """A model's tensors by the names of GGUF, in the layout of llama.cpp.

    Args:
        tensors: by their names in transformers' files.
        architecture: GGUF's name.
        config: of the model.
    """
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("transformer.") if architecture == "bloom" else name
        number = re.search(r"experts\.(\d+)\.", plain)
        there = names.get_name(re.sub(r"experts\.\d+\.", "experts.", plain), try_suffixes=(".weight", ".bias"))
        assert there is not None, name
        value = _value(there, tensor, architecture, config)
        if number:
            experts.setdefault(there, {})[int(number[1])] = value
        else:
            found[there] = value
    return found | {there: torch.stack([of[i] for i in range(len(of))]) for there, of in experts.items()}


def rows_as_in_gguf(name: str, tensor: Tensor, architecture: str, config: Any) -> Tensor:
    """The same of what makes a layer's outputs, such as B of an adapter."""
    order = _order(name, len(tensor), architecture, config)
    return tensor if order is None else tensor[order]


def _value(name: str, tensor: Tensor, architecture: str, config: Any) -> Tensor:
    if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return tensor + 1
    of_conv1d = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    if architecture == "gpt2" and name.endswith(of_conv1d):
        return tensor.T
    return rows_as_in_gguf(name, tensor, architecture, config)


def _order(name: str, rows: int, architecture: str, config: Any) -> list[int] | None:
    """Rows of transformers in the order of llama.cpp; None for as they are."""
    if architecture == "llama" and re.search(r"attn_[qk]\.", name):
        heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
        half = rows // heads // 2
        return [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]
    if architecture in ("gptneox", "bloom") and "attn_qkv." in name:
        heads = config.num_attention_heads
        size = rows // heads // 3
        return [(head * 3 + what) * size + i for what in range(3) for head in range(heads) for i in range(size)]
    return None
