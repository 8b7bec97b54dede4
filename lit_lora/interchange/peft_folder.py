"""The files in an adapter's folder, read without trusting them.

Anyone can have written them. Nothing in them runs; sizes are limited; the header of the weights, which says what is in
the file, is read and compared with the model before any tensor is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_lora.adapters.module_names import plain_name

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_WEIGHTS = (CONFIG_NAME, WEIGHTS_NAME, "adapter_model.bin")
_TOKENIZER_PATTERNS = ("*token*", "*.jinja", "vocab.*", "merges.txt", "*.model")
"""Of files that a tokenizer may consist of; no code among them."""

_MOST_CONFIG_BYTES = 16 << 20
_MOST_HEADER_BYTES = 32 << 20
"""A mixture with an adapter on each of 10,000 experts needs a tenth of this."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_BUFFERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
"""What a module that was trained in full may hold beside parameters."""


class StoredTensor(NamedTuple):
    """What the header of a weights file says about one tensor."""

    name: str
    """In the model."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""


def find_folder(folder_or_hub_id: str | Path) -> Path:
    """The folder of an adapter, downloaded where it is on the Hub.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    if folder.exists():
        raise ValueError(f"{folder} is a file: expected the folder that holds {CONFIG_NAME}")
    if isinstance(folder_or_hub_id, Path) or not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise ValueError(f"no adapter folder {name!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*_WEIGHTS, *_TOKENIZER_PATTERNS]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"no adapter folder {name!r}, and none of that name on the Hub: {error}") from error


def find_weights(folder: Path) -> Path:
    """The weights file in a folder.

    Raises:
        ValueError: if there is none that can be read safely.
    """
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").is_file():
        raise ValueError(
            f"{folder} holds adapter_model.bin, a pickle, which may run code when loaded and is not read: save it "
            "again with a current version of PEFT, as safetensors"
        )
    raise ValueError(f"{folder} holds no {WEIGHTS_NAME}")


def read_config(path: Path) -> Any:
    """The content of an ``adapter_config.json``.

    Raises:
        ValueError: if it is missing, too large, or no JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {CONFIG_NAME}")
    size = path.stat().st_size
    if size > _MOST_CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than any adapter's configuration needs")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}. This is not JSON: take an undamaged copy of the adapter") from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Key in a weights file -> what it says about that tensor.

    Raises:
        ValueError: if the file is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is not a whole safetensors file: its header does not fit into {size:,} bytes")
        if length > _MOST_HEADER_BYTES:
            raise ValueError(f"{path} has a header of {length:,} bytes, more than any adapter needs")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            stored = {
                key: StoredTensor(_name_in_model(key), tuple(map(int, entry["shape"])), str(entry["dtype"]))
                for key, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    for tensor in stored.values():
        if tensor.dtype not in (_FLOATS if ".lora_" in tensor.name else _FLOATS + _BUFFERS):
            raise ValueError(f"{path} holds {tensor.name} as {tensor.dtype}, expected one of {', '.join(_FLOATS)}")
    return stored


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file.

    Raises:
        ValueError: if the file is damaged, or larger than memory.
    """
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OverflowError, KeyError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def adapted_in(header: Iterable[StoredTensor]) -> list[str]:
    """Names of the layers that a weights file holds adapters for."""
    ends = re.compile(r"(.*)\.(lora_A\.weight|lora_embedding_A)")
    return sorted({match[1] for tensor in header if (match := ends.fullmatch(tensor.name))})


def _name_in_model(key: str) -> str:
    """Name on disk -> name in the model; other trainers leave the adapter's name in (``lora_A.default.weight``)."""
    name = plain_name(key).removeprefix(PREFIX)
    name = re.sub(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$", r".\1.\2", name)
    name = re.sub(r"\.(lora_embedding_[AB])\.[^.]+$", r".\1", name)
    name = re.sub(r"\.lora_magnitude_vector\.[^.]+(\.weight)?$", ".lora_magnitude_vector", name)
    name = re.sub(r"\.(token_adapter\.trainable_tokens_delta)\.[^.]+$", r".\1", name)
    name = name.replace(".token_adapter.base_layer.", ".base_layer.")
    # With a resized vocabulary PEFT also writes both halves of its wrapper around a saved embedding.
    name = re.sub(r"\.modules_to_save\.([^.]+\.)?(weight|bias)$", r".\2", name)
    return name.replace(".original_module.", ".base_layer.")
