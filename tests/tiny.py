"""Tiny models and batches that tests share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lit_lora.config import OptimizationConfig, StepConfig

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def grouped(**settings: Any) -> dict[str, Any]:
    """Arguments of ``LoRALightningModule``, where fields of its optimization and its step stand among the others."""
    made = {}
    for name, kind in (("optimization", OptimizationConfig), ("step", StepConfig)):
        names = {field.name for field in fields(kind)} & settings.keys()
        made[name] = kind(**{field: settings.pop(field) for field in sorted(names)})
    return {**settings, **made}


def config(kind: str = "Llama", **fields: Any) -> PreTrainedConfig:
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **fields})


def language_model(kind: str = "Llama", *, seed: int = 0, std: float = 0.3, **fields: Any) -> PreTrainedModel:
    """Random weights, large enough that attention and head matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(kind, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in name:
                parameter.normal_(std=std)
    return model.eval()


def examples(lengths: tuple[int, ...] = (7, 12, 5), seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    """Token ids and supervised mask of ragged examples; the first third of each is its prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist()
        made.append((ids, [position >= max(1, length // 3) for position in range(length)]))
    return made
