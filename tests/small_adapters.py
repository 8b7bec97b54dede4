"""A tiny base with a tokenizer and an adapter, to be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_lora import LoRAConfig, inject_lora, load_base_model, save_adapter
from lit_lora.adapters.layers import lora_layers
from tests.chat_tokenizers import CHATML, VOCAB_SIZE, chat_tokenizer
from tests.tiny import language_model

MERGES = [("t", "h"), ("th", "e"), ("e", "r")]
SIZE = VOCAB_SIZE + len(MERGES)
RANKS = {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "use_rslora": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": False}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama, one head for all": ("Llama", {"num_key_value_heads": 1}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 128}),
}
"""What can be written as GGUF: kind of model, and fields of its config."""


def small_adapter(folder: Path, kind: str = "Llama", lora: dict[str, Any] | None = None, **sizes: Any) -> str:
    """The folder of an adapter that matters, for a base beside it."""
    template = sizes.pop("template", CHATML)
    sizes = {"vocab_size": SIZE, "hidden_size": 64, "bos_token_id": None, "eos_token_id": 256 + len(MERGES), **sizes}
    language_model(kind, std=0.15, **sizes).save_pretrained(folder / "base")
    chat_tokenizer(template, merges=MERGES).save_pretrained(folder / "base")
    model = load_base_model(str(folder / "base"))
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(**{"r": 4, "init_lora_weights": False, **(lora or RANKS)}))
    for _, layer in lora_layers(model):
        layer.factors()[1].data.mul_(0.3)
    save_adapter(model, folder / "adapter", tokenizer=chat_tokenizer(template, merges=MERGES))
    return str(folder / "adapter")
