"""A base where it is stored: its tensors in safetensors files, and the model without values that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lit_lora.base import base_hash, load
from lit_lora.base.whole_model import check_no_adapter, readable


def why_whole(location: str, gguf_file: str | None, revision: str | None) -> str:
    """Why a base cannot be read a layer at a time; empty if it may be."""
    if gguf_file:
        return "it is a GGUF file"
    if load.is_quantized_already(location, revision):
        return "its weights are stored quantized"
    if not base_hash.weight_files(location, None, revision):
        return "it is not on this machine yet, and is downloaded now"
    return ""


def valueless_model(
    location: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of a folder on the meta device, with the settings for generation that lie beside its weights."""
    check_no_adapter(location, revision)
    revised: dict[str, Any] = {} if revision is None else {"revision": revision}
    config = readable(
        location, lambda: AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code, **revised)
    )
    with torch.device("meta"):
        model: PreTrainedModel = readable(
            location,
            lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code),
        )
    files = base_hash.weight_files(location, None, revision)
    if model.can_generate() and files and (Path(files[0]).parent / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(location, **revised)
    return model


class Stored:
    """Tensors in safetensors files, as values for :func:`lit_lora.base.filled.fill_`.

    Args:
        files: that hold them.
        tied: names that a model may have beside them, for the same tensors.
    """

    def __init__(self, files: list[Path], tied: set[str]) -> None:
        self._tied = tied
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    self._file_of[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    @property
    def largest_file(self) -> int:
        """Bytes of the largest of the files."""
        return max(path.stat().st_size for path in self._file_of.values())

    def are_of(self, model: PreTrainedModel) -> bool:
        """Whether these are the model's own tensors, under its own names, and kept in the type that it asks for."""
        kept_wide = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
        if kept_wide and model.dtype is not torch.float32:
            return False
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        missing = shapes.keys() - self._shapes.keys() - self._tied
        return not missing and all(shapes.get(name) == shape for name, shape in self._shapes.items())

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __call__(self, name: str, module: nn.Module, owner: PreTrainedModel) -> None:
        """Give a module's own tensors their values."""
        if next(module.buffers(recurse=False), None) is not None:
            owner._init_weights(module)  # buffers that no file holds are computed
        own: dict[str, Any] = {
            **dict(module.named_parameters(recurse=False)),
            **dict(module.named_buffers(recurse=False)),
        }
        by_file: dict[Path, dict[str, Tensor]] = {}
        for key, tensor in own.items():
            full = f"{name}.{key}" if name else key
            if full in self._file_of:
                by_file.setdefault(self._file_of[full], {})[full] = tensor
        for path, tensors in by_file.items():
            # Opened for each module: what was mapped and read counts as this process's memory until it is closed.
            with safe_open(path, framework="pt") as file, torch.no_grad():
                for full, tensor in tensors.items():
                    _copy(file.get_tensor(full), tensor)


def _copy(stored: Tensor, tensor: Tensor) -> None:
    """Into a tensor that may have more rows, if its vocabulary grew; these are the mean of the others."""
    before = len(stored) if stored.ndim else 0
    if stored.shape == tensor.shape:
        tensor.copy_(stored)
        return
    tensor[:before].copy_(stored)
    tensor[before:] = tensor[:before].float().mean(dim=0).to(tensor.dtype)
