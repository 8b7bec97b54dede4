"""Load a base that is divided among processes, so that none of them ever holds the whole of it.

The model is made without values. Then each decoder layer is read from its safetensors file (or drawn, for
``random:``), quantized, and cut down to this process's share before the next one is read. A file is mapped into memory,
so processes on one machine share what the system keeps of it. What transformers must rearrange while it loads (other
names in the files than in the model, weights that are quantized already, GGUF) is loaded whole and then divided, one
process of a machine after another.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from lit_lora.base import base_hash, load, quantize
from lit_lora.base.filled import fill_
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.base.shards import Sharding
from lit_lora.base.stored import Stored, valueless_model, why_whole
from lit_lora.base.whole_model import readable
from lit_lora.config import QuantizationConfig
from lit_lora.kernels.cuda_cards import prepare_attention


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
    device = torch.device(device) if device is not None else torch.get_default_device()
    torch_dtype = load.resolve_dtype(dtype, device)
    prepare_attention(device)

    def divide(layer: nn.Module) -> None:
        sharding.shard_layer_(layer.requires_grad_(False))

    settings: tuple[Any, ...] = (torch_dtype, quantization, device, revision, trust_remote_code)
    if base.startswith(load.RANDOM):
        model = load.random_model(base, torch_dtype, quantization, device, revision, trust_remote_code, 0, divide)
    else:
        location, gguf_file = load.resolve_base(base)
        reason = why_whole(location, gguf_file, revision)
        streamed = None if reason else _from_files(base, location, divide, *settings)
        if streamed is None:
            rank_zero_info(
                f"{base} is loaded whole by one process of a machine after another, and then divided: "
                f"{reason or 'its files name other tensors than the model has'}"
            )
            streamed = _one_after_another(base, divide, *settings)
        model = streamed
    sharding.shard_(model.requires_grad_(False))
    return model.train()


def _from_files(
    base: str,
    location: str,
    divide: Callable[[nn.Module], None],
    dtype: torch.dtype,
    quantization: QuantizationConfig | None,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel | None:
    """The model with its layers divided; None if transformers would do more than to copy tensors of the same names."""
    model = valueless_model(location, dtype, revision, trust_remote_code)
    files = base_hash.weight_files(location, None, revision)
    stored = Stored(files, tied=set(getattr(model, "all_tied_weights_keys", None) or ()))
    if not readable(location, lambda: stored.are_of(model)):
        return None
    beside_loading = base_hash.hash_weights(location, None, revision)
    fill_(model, stored, device=device, quantization=quantization, layer_done=divide)
    model.tie_weights()
    base_hash.note_base(model, beside_loading)
    if quantization is not None:
        quantize.finish_quantization_(model, quantization)
    load.note_loaded(model, base, location, quantization, dtype, revision)
    return model


def _one_after_another(
    base: str,
    divide: Callable[[nn.Module], None],
    dtype: torch.dtype,
    quantization: QuantizationConfig | None,
    device: torch.device,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    turn = int(os.environ.get("LOCAL_RANK", "0"))
    turns: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(turns, turn)
    model: Any = None
    for now in range(max(turns) + 1):
        if now == turn:
            model = load.load_base_model(
                base,
                dtype=dtype,
                quantization=quantization,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            for layer in repeated_layers(model):
                divide(layer)
        dist.barrier()
    return model
