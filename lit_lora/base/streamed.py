"""Load a base that is divided among processes, so that none of them ever holds the whole of it.

The model is made without values. Then each weight is read from its safetensors file (or drawn, for ``random:``),
quantized, and cut down to this process's share before the next one is read. A file is mapped into memory, so processes
on one machine share what the system keeps of it, and rows that are not this process's are not even read. What
transformers must rearrange while it loads (other names in the files than in the model, weights that are quantized
already, GGUF) is loaded whole and then divided, one process of a machine after another.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from lit_lora.base import base_hash, load, quantize
from lit_lora.base.filled import fill_
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.base.shards import Sharding, check_takes_codes
from lit_lora.base.stored import Stored, opened, why_whole
from lit_lora.base.vocabulary import grow_vocabulary, num_rows
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
    rows: int = 0,
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
        rows: of embedding and head, at least, as of :func:`lit_lora.base.vocabulary.grow_vocabulary`.

    Raises:
        FileNotFoundError: as there.
        ValueError: as there.
    """
    if quantization is not None:
        check_takes_codes()
    asked = load.wanted(base, dtype, quantization, device, revision, trust_remote_code)
    if base.startswith(load.RANDOM):
        model = load.random_model(asked, sharding)
    else:
        location, gguf_file = load.resolve_base(base)
        if not (reason := why_whole(location, gguf_file, revision)):
            model, stored = opened(asked, location)
            reason = stored.why_whole(model)
        if reason:
            rank_zero_info(
                f"{base} is loaded whole by one process of a machine after another, and then divided: {reason}"
            )
            model = _one_after_another(asked, sharding)
        else:
            _read_(model, stored, asked, location, sharding)
    _grow_(model, rows, sharding, asked.device)
    sharding.shard_(model.requires_grad_(False))
    return model.train()


def _grow_(model: PreTrainedModel, rows: int, sharding: Sharding, device: torch.device) -> None:
    """More rows of embedding and head, which are whole meanwhile, as they are whenever the model runs."""
    if num_rows(model) >= rows:
        return
    were_cut = [sharding.join_(model.get_input_embeddings())]
    model.tie_weights()
    if (head := model.get_output_embeddings()) is not None:
        were_cut.append(sharding.join_(head))
    grow_vocabulary(model, rows)
    if any(were_cut):
        sharding.cut_(model.get_input_embeddings(), device, {})
        model.tie_weights()
        if head is not None:
            sharding.cut_(model.get_output_embeddings(), device, {})


def _read_(model: PreTrainedModel, stored: Stored, asked: load.Wanted, location: str, sharding: Sharding) -> None:
    """Give the model its values, with its layers divided and what else it has cut."""
    beside_loading = base_hash.hash_weights(location, None, asked.revision)
    fill_(model, stored, device=asked.device, quantization=asked.quantization, sharding=sharding)
    model.tie_weights()
    base_hash.note_base(model, beside_loading)
    if asked.quantization is not None:
        quantize.finish_quantization_(model, asked.quantization, experts=False)
    load.note_loaded(model, asked, location)


def _one_after_another(asked: load.Wanted, sharding: Sharding) -> PreTrainedModel:
    turn = int(os.environ.get("LOCAL_RANK", "0"))
    turns: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(turns, turn)
    model: Any = None
    for now in range(max(turns) + 1):
        if now == turn:
            model = load.load_wanted(asked, experts=False).requires_grad_(False)
            for layer in repeated_layers(model):
                sharding.shard_layer_(layer)
        dist.barrier()
    return model
