"""Load a base that is divided among processes, so that none of them ever holds the whole of it.

The model is made without values. Then each weight is read from its safetensors file (or drawn, for ``random:``),
quantized, and cut down to this process's share before the next one is read. A file is mapped into memory, so processes
on one machine share what the system keeps of it, and rows that are not this process's are not even read. What
transformers must rearrange while it loads (other names in the files than in the model, weights that are quantized
already, GGUF) is loaded whole and then divided, one process of a machine after another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from lit_lora.base import base_hash, load, quantize
from lit_lora.base.filled import fill_
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.base.shards import Sharding
from lit_lora.base.whole_model import check_no_adapter, readable
from lit_lora.config import QuantizationConfig


def load_sharded_base(
    base: str,
    sharding: Sharding,
    *,
    dtype: str | torch.dtype = "auto",
    quantization: QuantizationConfig | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """As :func:`lit_lora.base.load.load_base_model`, of which this process keeps its share; every process must call it.

    Args:
        base: as there, and all that follows.
        sharding: among which processes.
        dtype: of the weights.
        quantization: how to quantize the linear layers.
        device: where to.
        revision: on the Hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        FileNotFoundError: as there.
        ValueError: as there.
    """
    asked = load.wanted(base, dtype, quantization, device, revision, trust_remote_code)
    if base.startswith(load.RANDOM):
        model = load.random_model(asked, sharding)
    else:
        location, gguf_file = load.resolve_base(base)
        if not (reason := _why_whole(location, gguf_file, revision)):
            model, stored = _opened(asked, location)
            reason = stored.why_whole(model)
        if reason:
            rank_zero_info(
                f"{base} is loaded whole by one process of a machine after another, and then divided: {reason}"
            )
            model = _one_after_another(asked, sharding)
        else:
            _read_(model, stored, asked, location, sharding)
    sharding.shard_(model.requires_grad_(False))
    return model.train()


def _why_whole(location: str, gguf_file: str | None, revision: str | None) -> str:
    """Why the files of a base cannot be read a weight at a time; empty if they may be."""
    if gguf_file:
        return "it is a GGUF file"
    if load.is_quantized_already(location, revision):
        return "its weights are stored quantized"
    if not base_hash.weight_files(location, None, revision):
        return "it is not on this machine yet, and is downloaded now"
    return ""


def _opened(asked: load.Wanted, location: str) -> tuple[PreTrainedModel, _Stored]:
    """The model without values, and where they are."""
    check_no_adapter(location, asked.revision)
    config = load.load_config(asked.base, revision=asked.revision, trust_remote_code=asked.trust_remote_code)
    model = asked.valueless(config)
    files = base_hash.weight_files(location, None, asked.revision)
    return model, readable(location, lambda: _Stored(files))


def _read_(model: PreTrainedModel, stored: _Stored, asked: load.Wanted, location: str, sharding: Sharding) -> None:
    """Give the model its values, with its layers divided and what else it has cut."""
    beside_loading = base_hash.hash_weights(location, None, asked.revision)
    fill_(model, stored, device=asked.device, quantization=asked.quantization, sharding=sharding)
    model.tie_weights()
    if model.can_generate() and (stored.folder / "generation_config.json").is_file():
        revised: dict[str, Any] = {} if asked.revision is None else {"revision": asked.revision}
        model.generation_config = GenerationConfig.from_pretrained(location, **revised)
    base_hash.note_base(model, beside_loading)
    if asked.quantization is not None:
        quantize.finish_quantization_(model, asked.quantization)
    load.note_loaded(model, asked, location)


class _Stored:
    """Tensors in safetensors files, as values for :func:`fill_`."""

    def __init__(self, files: list[Path]) -> None:
        self.folder = files[0].parent
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    self._file_of[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

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
                        module.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
                    else:
                        buffers[key].copy_(tensor)


def _one_after_another(asked: load.Wanted, sharding: Sharding) -> PreTrainedModel:
    turn = int(os.environ.get("LOCAL_RANK", "0"))
    turns: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(turns, turn)
    model: Any = None
    for now in range(max(turns) + 1):
        if now == turn:
            model = load.load_wanted(asked).requires_grad_(False)
            for layer in repeated_layers(model):
                sharding.shard_layer_(layer)
        dist.barrier()
    return model
