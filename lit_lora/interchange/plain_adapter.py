"""Adapters of nothing but A and B on layers: what llama.cpp, vLLM and mlx-lm put on a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from lit_lora.interchange.peft_folder import CONFIG_NAME
from lit_lora.interchange.stored_adapter import read_adapter, stored_values

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM takes (``vllm/config/lora.py``); an adapter may have any rank up to it."""

VLLM_WITHOUT_LORA = (
    "BloomForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Starcoder2ForCausalLM",
)  # fmt: skip
"""Models of vLLM that are no ``SupportsLoRA`` (``vllm/model_executor/models``): it stops with an error on them."""

MLX_WEIGHTS_NAME = "adapters.safetensors"


class PlainAdapter(NamedTuple):
    """An adapter in its portable form, by names in the model."""

    tensors: dict[str, Tensor]
    r: int
    lora_alpha: float


def check_plain(folder: Path, target: str) -> None:
    """Check that an adapter is one of A and B on linear layers alone.

    Args:
        folder: of the adapter, in PEFT's format.
        target: who is to read it, for the message.

    Raises:
        ValueError: naming what else it has.
    """
    stored = read_adapter(folder)
    config = stored.config
    found = {
        "DoRA (use_dora)": config.use_dora,
        f"trained biases (bias {config.bias!r})": config.bias != "none",
        "biases of its own (lora_bias)": config.lora_bias,
        f"modules trained in full ({', '.join(config.modules_to_save or [])})": bool(config.modules_to_save),
        "rows of an embedding (trainable_token_indices)": config.trainable_token_indices is not None,
        "adapted parameters such as experts (target_parameters)": bool(config.target_parameters),
    }
    halves = (".lora_A.weight", ".lora_B.weight")
    others = [t.name for t in stored.header.values() if not t.name.endswith(halves) or len(t.shape) != 2]
    found[f"the tensor {next(iter(others), '')}"] = bool(others)
    present = [what for what, is_there in found.items() if is_there]
    if present:
        raise ValueError(
            f"{target} cannot take this adapter: it has {present[0]}, and {target} puts A and B on linear layers. "
            "Export the merged model (--to hf, or --to gguf without --adapter_only)"
        )


def read_portable(folder: Path) -> PlainAdapter:
    """Read an adapter that was written in its portable form."""
    stored = read_adapter(folder)
    return PlainAdapter(stored_values(stored), stored.config.r, stored.config.lora_alpha)


def check_vllm_model(config: PreTrainedConfig) -> None:
    """Check that vLLM puts adapters on a model.

    Args:
        config: of the base.

    Raises:
        ValueError: if it does not.
    """
    name = next(iter(config.architectures or [type(config).__name__]))
    if name in VLLM_WITHOUT_LORA:
        raise ValueError(
            f"vLLM serves no adapters on {name}: serve the merged model (--to hf). --to portable writes the adapter "
            "that --to vllm would write"
        )


def vllm_rank(r: int) -> int:
    """The ``--max-lora-rank`` that an adapter needs.

    Raises:
        ValueError: if vLLM has none.
    """
    enough = [rank for rank in VLLM_RANKS if rank >= r]
    if not enough:
        raise ValueError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter's is {r}: serve the merged model (--to hf)"
        )
    return enough[0]


def write_mlx(adapter: PlainAdapter, folder: Path, base: str, num_layers: int) -> None:
    """Write an adapter as mlx-lm reads it: A ``(in, r)`` and B ``(r, out)``, and which layers they are for.

    Args:
        adapter: in its portable form.
        folder: that is there.
        base: name of the model.
        num_layers: decoder layers of it.

    Raises:
        ValueError: if one of the layers lies outside of the decoder layers.
    """
    tensors, keys = {}, set()
    for name, tensor in adapter.tensors.items():
        layer, _, half = name.removesuffix(".weight").rpartition(".")
        start, _, inside = layer.partition(".layers.")
        number, _, key = inside.partition(".")
        if start != "model" or not number.isdigit() or not key:
            raise ValueError(
                f"mlx-lm cannot take an adapter of {layer}: it names layers by where they are in model.layers. Export "
                "the merged model (--to hf)"
            )
        keys.add(key)
        tensors[f"{layer}.{half.lower()}"] = tensor.t().contiguous()
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": num_layers,
        "lora_parameters": {
            "rank": adapter.r,
            "scale": adapter.lora_alpha / adapter.r,
            "dropout": 0.0,
            "keys": sorted(keys),
        },
    }
    save_file(tensors, folder / MLX_WEIGHTS_NAME, {"format": "mlx"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
