"""Tiny models of the conformance table: how each is built and called, and what of it is adapted."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from tests.tiny import SIZES

IDS = torch.arange(3, 17).view(2, 7)
_CAUSAL = {**SIZES, "num_hidden_layers": 1, "tie_word_embeddings": False}
_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    kind: str
    """Class of transformers."""
    attention: tuple[str, ...]
    """Layers of the attention, or of what stands for it."""
    ends: tuple[str, ...]
    """Embedding and head, or what is there in their place."""
    saved: str
    """A module to train in full."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the config."""
    sizes: dict[str, Any] = field(default_factory=lambda: _CAUSAL)

    @property
    def task(self) -> str | None:
        """PEFT's name for it."""
        return "CAUSAL_LM" if self.kind.endswith(("CausalLM", "LMHeadModel")) else None


_T5 = {
    "vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_WHISPER = {
    "vocab_size": 128, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
    "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0, "decoder_start_token_id": 1,
    "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_TRANSFORMER_H = ("transformer.ln_f", {"n_positions": 64})

ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("LlamaForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm"),
    "Mistral": Architecture("MistralForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm"),
    "Qwen2": Architecture("Qwen2ForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm"),
    "Qwen3": Architecture("Qwen3ForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm", {"head_dim": 8}),
    "Gemma 2": Architecture("Gemma2ForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm", {"head_dim": 8}),
    "Gemma 3": Architecture("Gemma3ForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm", {"head_dim": 8}),
    "Phi-3": Architecture("Phi3ForCausalLM", ("qkv_proj", "o_proj"), ("embed_tokens", "lm_head"), "model.norm"),
    "GPT-2": Architecture("GPT2LMHeadModel", ("attn.c_attn", "attn.c_proj"), ("wte", "lm_head"), *_TRANSFORMER_H),
    "GPT-NeoX": Architecture(
        "GPTNeoXForCausalLM", ("query_key_value", "attention.dense"), ("embed_in", "lm_head"),
        "gpt_neox.final_layer_norm",
    ),
    "OPT": Architecture(
        "OPTForCausalLM", ("q_proj", "k_proj", "v_proj", "out_proj"), ("embed_tokens", "lm_head"),
        "model.decoder.final_layer_norm", {"ffn_dim": 32, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "BLOOM": Architecture(
        "BloomForCausalLM", ("query_key_value", "self_attention.dense"), ("word_embeddings", "lm_head"),
        "transformer.ln_f",
    ),
    "Falcon": Architecture(
        "FalconForCausalLM", ("query_key_value", "self_attention.dense"), ("word_embeddings", "lm_head"),
        "transformer.ln_f", {"bias": True},
    ),
    "StarCoder2": Architecture("Starcoder2ForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm"),
    "Mixtral": Architecture("MixtralForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm", _EXPERTS),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm", {**_EXPERTS, "head_dim": 8}
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM", _QKVO, ("embed_tokens", "lm_head"), "model.norm", {**_EXPERTS, "head_dim": 8}
    ),
    "Mamba": Architecture(
        "MambaForCausalLM", ("in_proj", "x_proj"), ("embeddings", "lm_head"), "backbone.norm_f", {"state_size": 8}
    ),
    "BERT": Architecture(
        "BertModel", ("query", "key", "value", "attention.output.dense"), ("word_embeddings",), "pooler",
        {"max_position_embeddings": 64},
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration", ("q", "k", "v", "o"), ("shared", "lm_head"), "decoder.final_layer_norm",
        sizes=_T5,
    ),
    "ViT": Architecture(
        "ViTModel", _QKVO, ("projection",), "layernorm", sizes=_VIT
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration", ("q_proj", "k_proj", "v_proj", "out_proj"), ("embed_tokens", "proj_out"),
        "model.decoder.layer_norm", sizes=_WHISPER,
    ),
}  # fmt: skip


@cache
def base_of(name: str) -> Any:
    """The model with weights that matter; to be copied."""
    architecture = ARCHITECTURES[name]
    kind = getattr(transformers, architecture.kind)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**architecture.sizes, **architecture.fields}))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "norm" not in parameter_name:
                nn.init.normal_(parameter, std=0.2)
            elif parameter_name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def outputs(model: Any, name: str) -> torch.Tensor:
    """Logits, or hidden states where there are none."""
    generator = torch.Generator().manual_seed(1)
    if name == "ViT":
        found = model(pixel_values=torch.randn(2, 3, 8, 8, generator=generator))
    elif name == "Whisper":
        found = model(input_features=torch.randn(2, 8, 16, generator=generator), decoder_input_ids=IDS)
    else:
        found = model(input_ids=IDS, **({"decoder_input_ids": IDS} if name == "T5" else {}))
    return found.logits if hasattr(found, "logits") else found.last_hidden_state
