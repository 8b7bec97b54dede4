"""A tiny base with a tokenizer and an adapter, to be exported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lit_lora import LoRAConfig, inject_lora, load_base_model, save_adapter
from lit_lora.adapters.layers import lora_layers
from tests.chat_tokenizers import CHATML, VOCAB_SIZE, chat_tokenizer
from tests.tiny import language_model

MERGES = [("t", "h"), ("th", "e"), ("e", "r")]
SIZE = VOCAB_SIZE + len(MERGES)
RANKS = {
    "target_modules": "all-linear",
    "rank_pattern": {"q_proj|qkv_proj|query_key_value|c_attn": 2},
    "use_rslora": True,
}
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
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": ("Qwen3Moe", {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 32,
    }),
    "Gemma 2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "Gemma 3": ("Gemma3Text", {
        "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
    "Phi-3": ("Phi3", {}),
    "OLMo 2": ("Olmo2", {}),
    "StarCoder2": ("Starcoder2", {}),
    "GPT-2": ("GPT2", {"n_positions": 256}),
    "GPT-NeoX": ("GPTNeoX", {"hidden_act": "gelu_fast"}),
    "BLOOM": ("Bloom", {}),
}  # fmt: skip
"""What can be written as GGUF: kind of model, and fields of its config."""


def small_adapter(folder: Path, kind: str = "Llama", lora: dict[str, Any] | None = None, **sizes: Any) -> str:
    """The folder of an adapter that matters, for a base beside it."""
    template = sizes.pop("template", CHATML)
    lora = {"r": 4, "init_lora_weights": False, **(lora or RANKS)}
    sizes = {"vocab_size": SIZE, "hidden_size": 64, "bos_token_id": None, "eos_token_id": 256 + len(MERGES), **sizes}
    base = language_model(kind, std=0.15, **sizes)
    for parameter in base.parameters():
        if parameter.ndim == 1:  # norms and biases matter, too
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    base.save_pretrained(folder / "base")
    chat_tokenizer(template, merges=MERGES).save_pretrained(folder / "base")
    model = load_base_model(str(folder / "base"))
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "not adapted", UserWarning)  # experts, which all-linear leaves out
        inject_lora(model, LoRAConfig(**lora))
    for _, layer in lora_layers(model):
        layer.factors()[1].data.mul_(0.3)
    save_adapter(model, folder / "adapter", tokenizer=chat_tokenizer(template, merges=MERGES))
    return str(folder / "adapter")
