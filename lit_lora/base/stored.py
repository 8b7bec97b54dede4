"""A base where it is stored: its tensors in safetensors files, and the model without values that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

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


def opened(asked: load.Wanted, location: str) -> tuple[PreTrainedModel, Stored]:
    """The model of a folder without values, with the settings for generation beside its weights; and these."""
    check_no_adapter(location, asked.revision)
    config = load.load_config(asked.base, revision=asked.revision, trust_remote_code=asked.trust_remote_code)
    model = asked.valueless(config)
    stored = readable(location, lambda: Stored(base_hash.weight_files(location, None, asked.revision)))
    if model.can_generate() and (stored.folder / "generation_config.json").is_file():
        revised: dict[str, Any] = {} if asked.revision is None else {"revision": asked.revision}
        model.generation_config = GenerationConfig.from_pretrained(location, **revised)
    return model, stored


class Stored:
    """Tensors in safetensors files, as values for :func:`lit_lora.base.filled.fill_`."""

    def __init__(self, files: list[Path]) -> None:
        self.folder = files[0].parent
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

    def why_whole(self, model: PreTrainedModel) -> str:
        """Why transformers would do more than to copy tensors to where the model has those names; empty if not."""
        kept_wide = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
        if kept_wide and model.dtype is not torch.float32:
            return "it keeps some of its weights in float32"
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        missing = shapes.keys() - self._shapes.keys() - tied
        if missing or any(shapes.get(name) != shape for name, shape in self._shapes.items()):
            return "its files name other tensors than the model has"
        return "its files hold a tied weight twice" if tied & self._shapes.keys() else ""

    def __call__(self, name: str, module: nn.Module, owner: PreTrainedModel, device: torch.device) -> None:
        """Give a module's own tensors their values; parameters lie in the file still, in its dtype."""
        if next(module.buffers(recurse=False), None) is not None:
            module.to_empty(device=device, recurse=False)
            owner._init_weights(module)  # buffers that no file holds are computed
        parameters, buffers = (dict(named(recurse=False)) for named in (module.named_parameters, module.named_buffers))
        stored = {key: f"{name}.{key}" if name else key for key in (*parameters, *buffers)}
        stored = {key: full for key, full in stored.items() if full in self._file_of}
        # Opened for each module: what was mapped and read counts as this process's memory until it is closed.
        for path in {self._file_of[full] for full in stored.values()}:
            with safe_open(path, framework="pt") as file:
                for key, full in stored.items():
                    if self._file_of[full] != path:
                        continue
                    tensor = file.get_tensor(full)  # mapped: what is not read of it takes no memory
                    if key in parameters:
                        tensor = _with_rows_of(tensor, parameters[key])
                        module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
                    else:
                        buffers[key].copy_(tensor)


def _with_rows_of(stored: Tensor, parameter: Tensor) -> Tensor:
    """As many rows as the parameter has, if its vocabulary grew; these are the mean of the others."""
    if stored.shape == parameter.shape:
        return stored
    before = len(stored)
    grown = torch.empty(parameter.shape, dtype=parameter.dtype)
    grown[:before].copy_(stored)
    grown[before:] = grown[:before].float().mean(dim=0).to(grown.dtype)
    return grown
