"""A model's folder, or an adapter, as a GGUF file: read and written a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors import safe_open
from torch import Tensor

from lit_lora.interchange.gguf_architecture import Architecture
from lit_lora.interchange.gguf_vocabulary import Vocabulary, write_vocabulary

Kind = Literal["f32", "f16", "bf16", "q8_0"]
"""What weights are stored as."""

_TYPES = {
    "f32": (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_PLAIN: dict[GGMLQuantizationType, Any] = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
_BLOCK = 32
"""Weights of a row that share a scale in q8_0."""


class _Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_model(folder: Path, path: Path, kind: Kind, architecture: Architecture, vocabulary: Vocabulary) -> None:
    """Write a model of transformers as one GGUF file.

    Args:
        folder: with its safetensors files.
        path: of the file to make.
        kind: what its matrices are stored as; vectors are always float32.
        architecture: of the model.
        vocabulary: of its tokenizer.

    Raises:
        ValueError: if a tensor has no name in GGUF, or is too large for float16.
    """
    entries = list(_model_entries(folder, architecture))
    writer = GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.write(writer)
    write_vocabulary(writer, vocabulary)
    _write_tensors(writer, entries, kind)


def write_adapter(
    tensors: Mapping[str, Tensor], lora_alpha: float, path: Path, kind: Kind, architecture: Architecture
) -> None:
    """Write an adapter as GGUF, for llama.cpp to put on the base.

    Args:
        tensors: A and B, by PEFT's names below the model.
        lora_alpha: numerator of the scale, for all layers; llama.cpp divides it by a layer's rank.
        path: of the file to make.
        kind: what they are stored as.
        architecture: of the base.

    Raises:
        ValueError: if llama.cpp cannot put one of them on.
    """
    entries = []
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if match is None or f".{match[1].split('.')[-1]}" not in _ADAPTED:
            raise ValueError(
                f"an adapter of {name} cannot be written as GGUF: llama.cpp puts A and B on the layers "
                f"{', '.join(sorted(end[1:] for end in _ADAPTED))}. Write the merged model instead"
            )
        layer, half = f"{match[1]}.weight", match[2]
        data = architecture.rows(layer, tensor) if half == "B" else tensor
        stored_as = f"{architecture.tensor_name(layer)}.lora_{half.lower()}"
        entries.append(_Entry(stored_as, tuple(data.shape), partial(torch.clone, data)))
    writer = GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora_alpha)
    writer.add_file_type(_TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_tensors(writer, entries, kind)


_ADAPTED = {
    ".q_proj", ".k_proj", ".v_proj", ".o_proj", ".gate_proj", ".up_proj", ".down_proj", ".qkv_proj", ".gate_up_proj",
    ".c_attn", ".c_fc", ".c_proj", ".query_key_value", ".dense", ".dense_h_to_4h", ".dense_4h_to_h",
}  # fmt: skip
_PRECISE = ("ffn_gate_inp.weight", "position_embd.weight")
"""Matrices that are float32 in every file of llama.cpp's own converter."""


def _model_entries(folder: Path, architecture: Architecture) -> Iterator[_Entry]:
    if architecture.rope_factors is not None:
        factors = architecture.rope_factors
        yield _Entry("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    found: dict[str, dict[int | None, tuple[Path, str]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored_as, expert = architecture.place(name)
                found.setdefault(stored_as, {})[expert] = (path, name)
                unwritten = torch.empty(file.get_slice(name).get_shape(), device="meta")
                shapes[stored_as] = tuple(architecture.value(name, unwritten).shape)
    for stored_as, pieces in found.items():
        if None in pieces:
            yield _Entry(stored_as, shapes[stored_as], partial(_read, *pieces[None], architecture))
        else:
            places = [place for _, place in sorted(pieces.items())]
            yield _Entry(stored_as, (len(places), *shapes[stored_as]), partial(_stacked, places, architecture))


def _read(path: Path, name: str, architecture: Architecture) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return architecture.value(name, file.get_tensor(name))


def _stacked(places: list[tuple[Path, str]], architecture: Architecture) -> Tensor:
    """One tensor of all experts."""
    return torch.stack([_read(path, name, architecture) for path, name in places])


def _write_tensors(writer: GGUFWriter, entries: list[_Entry], kind: Kind) -> None:
    types = [_type_of(entry, kind) for entry in entries]
    for entry, stored in zip(entries, types, strict=True):
        shape = gguf.quant_shape_to_byte_shape(entry.shape, stored) if stored not in _PLAIN else entry.shape
        dtype = np.dtype(_PLAIN.get(stored, np.uint8))
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(entry.name, shape, dtype, num_bytes, None if stored in _PLAIN else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, stored in zip(entries, types, strict=True):
        writer.write_tensor_data(_stored(entry, stored))
    writer.close()


def _type_of(entry: _Entry, kind: Kind) -> GGMLQuantizationType:
    if len(entry.shape) < 2 or entry.name.endswith(_PRECISE):
        return GGMLQuantizationType.F32
    stored = _TYPES[kind][0]
    # As llama.cpp does, where a row is no whole number of blocks.
    ragged = stored is GGMLQuantizationType.Q8_0 and entry.shape[-1] % _BLOCK
    return GGMLQuantizationType.F16 if ragged else stored


def _stored(entry: _Entry, stored: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    values = entry.read().to(torch.float32)
    if stored is GGMLQuantizationType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError(f"{entry.name} holds {values.abs().max():.3g}, too much for float16: write bf16 or f32")
    data = values.contiguous().numpy()
    return data.astype(_PLAIN[stored]) if stored in _PLAIN else gguf.quants.quantize(data, stored)
