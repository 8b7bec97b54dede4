"""What GGUF's readers compute in one way only is a condition on a model's config, found before anything is read."""

from __future__ import annotations

from typing import Any

import gguf
import pytest

from lit_lora.interchange.gguf_architecture import Architecture
from lit_lora.interchange.gguf_kinds import KINDS
from tests.small_adapters import MODELS
from tests.tiny import config

CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def _architecture(kind: str, **fields: Any) -> Architecture:
    name = CLASSES.get(kind, f"{kind}ForCausalLM")
    return Architecture(config(kind, **{"hidden_size": 64, **fields}, architectures=[name]))


def test_each_kind_of_the_table_is_made_by_the_tests_that_compare_logits():
    made = {CLASSES.get(kind, f"{kind}ForCausalLM") for kind, _ in MODELS.values()}
    assert made == set(KINDS)
    for kind, fields in MODELS.values():
        architecture = _architecture(kind, **fields)
        assert architecture.name == gguf.MODEL_ARCH_NAMES[architecture.kind.arch]


CONDITIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another architecture": ("OPT", {}, "architecture OPTForCausalLM is not one of LlamaForCausalLM, "),
    "activation": ("Llama", {"hidden_act": "gelu"}, "hidden_act is gelu, expected silu"),
    "GELU by erf": ("GPTNeoX", {"hidden_act": "gelu"}, "hidden_act is gelu, expected gelu_pytorch_tanh or gelu_new"),
    "window": ("Mistral", {"sliding_window": 8}, "sees a sliding window, which llama.cpp would ignore"),
    "window of StarCoder2": ("Starcoder2", {"sliding_window": 8}, "sees a sliding window"),
    "window of Phi-3": ("Phi3", {"sliding_window": 8}, "sees a sliding window"),
    "window of some layers": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sees a sliding window"
    ),
    "experts that are not normed": ("Qwen3Moe", {"norm_topk_prob": False}, "norm_topk_prob is False, expected True"),
    "layers without experts": (
        "Qwen3Moe", {"norm_topk_prob": True, "mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], expected"
    ),
    "no soft cap": (
        "Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": None},
        "attn_logit_softcapping is None, expected a number",
    ),
    "scaled positions of windows": (
        "Gemma3Text",
        {
            "head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            },
        },
        r"its positions are scaled \(linear\) where it sees a window",
    ),
    "scale of queries": (
        "Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, expected 32"
    ),
    "scale of queries of the largest": (
        "Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 46},
        "query_pre_attn_scalar is 32, expected 16",
    ),
    "a head of its own": (
        "Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": False},
        "tie_word_embeddings is False, expected True",
    ),
    "no head of its own": ("Olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings is True, expected False"),
    "biases": ("Qwen3", {"attention_bias": True}, "attention_bias is True, expected False"),
    "size of heads": ("Olmo2", {"head_dim": 32}, "head_dim is 32, expected hidden_size by num_attention_heads"),
    "positions": (
        "Qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        r"its positions are scaled \(linear\)",
    ),
    "long positions": (
        "Phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8,
                "original_max_position_embeddings": 64, "factor": 2.0,
            },
        },
        r"its positions are scaled \(longrope\)",
    ),
    "a part of each head": (
        "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "it rotates a part of each head alone",
    ),
    "attention scaled by layer": (
        "GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, expected False"
    ),
    "residual after the norm": (
        "Bloom", {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm is True, expected False",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "message"), CONDITIONS.values(), ids=CONDITIONS)
def test_what_llama_cpp_would_compute_otherwise_is_an_error_that_names_the_field(kind, fields, message):
    with pytest.raises(ValueError, match=f"this model cannot be written as GGUF: .*{message}"):
        _architecture(kind, **fields)


def test_a_window_that_no_text_is_longer_than_is_none():
    assert _architecture("Mistral", sliding_window=4096, max_position_embeddings=4096).name == "llama"
