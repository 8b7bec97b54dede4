"""Tiny configs of any architecture that the installed transformers knows, made by looking at its config class.

A config class has defaults for everything; what is a size is made small, by the name of the field, and what lists one
value a layer is cut to as few layers as show every kind of them. Where sizes depend on each other in ways that no name
tells, ``FIELDS`` has them by model type.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCAB = 160
WINDOW = 8
"""Tokens of every sliding window and chunk."""

_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?", VOCAB),
    (r"max_position.*|n_positions|max_seq_len|n_ctx|max_.*positions|original_max_.*|max_length|model_max_length", 512),
    (r".*window.*|.*attention_chunk_size|local_attention|.*block_size|index_topk.*|keep_window_size", WINDOW),
    (r"num_hidden_layers|.*_layers|n_layers?|num_layers.*|num_blocks|depth|.*_depth", 2),
    (r".*num_key_value_heads|num_kv_heads|kv_n_heads", 2),
    (r".*attention_heads|n_heads?|num_heads|.*_n_heads|.*_num_heads|linear_num_.*_heads|n_mamba_heads", 4),
    (r"num_.*experts|n_routed_experts|num_experts|zero_expert_num", 4),
    (r"num_experts_per_.*|moe_top_?k|top_k|num_selected_experts|moe_k", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"rotary_dim", 4),
    (r"head_dim|.*_head_dim|kv_channels|d_kv|attention_head_size|mamba_d_head", 8),
    (r".*intermediate_size.*|.*ffn_dim|d_ff|dim_ff|n_inner|.*ffn_hidden_size|dff|feed_forward_size", 64),
    (r".*_rank|.*lora_rank.*", 8),
    (r"hidden_size.*|.*hidden_size|d_model|n_embd|.*embed_dim|embedding_size|lru_width|emb_dim|.*_dim|dim", 32),
    (r".*d_state|state_size|ssm_state_size", 8),
)
_PATTERNS = [(re.compile(rf"(?:{pattern})\Z"), size) for pattern, size in _SIZES]

FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "mamba_n_groups": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_local_experts": 4, "num_experts_per_tok": 2},
    "encoder-decoder": {"decoder_start_token_id": 1, "pad_token_id": 0},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_groups": 1},
    "granitemoehybrid": {"mamba_d_head": 16, "mamba_n_groups": 1, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_head_dim": 16},
    "longt5": {"decoder_start_token_id": 0},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "xlm": {"causal": True},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 16, "mamba_ngroups": 1},
}


_MOST_KINDS = 5


def tiny_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """A small config of this type without dropout.

    Args:
        model_type: key of transformers' ``CONFIG_MAPPING``.
        fields: to set in any case.
    """
    kind = CONFIG_MAPPING[model_type]
    base = kind()
    decoder = {"is_decoder": True} if hasattr(base, "is_decoder") and not base.is_encoder_decoder else {}
    return kind(**{**_tiny_fields(base), **decoder, **FIELDS.get(model_type, {}), **fields})


def _tiny_fields(config: PreTrainedConfig) -> dict[str, Any]:
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    num_layers = getattr(config, "num_hidden_layers", None)
    kept = _layers_to_keep(values, num_layers)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            own = FIELDS.get(value.model_type, {})
            found[name] = {"model_type": value.model_type, **_tiny_fields(value), **own}
        elif isinstance(value, (list, tuple)) and len(value) == num_layers:
            found[name] = _tiny_list(name, list(value), kept)
        elif isinstance(value, float) and re.search(r"drop|layerdrop|jitter", name):
            found[name] = 0.0
        elif re.search(r"_token_(id|index)s?\Z", name):
            found[name] = _tiny_ids(value)
        elif type(value) is int:
            found[name] = kept if value == num_layers and re.search(r"layers?\Z", name) else _tiny_size(name, value)
    if "kv_lora_rank" in values:  # latent attention has as many key heads as query heads
        found["num_key_value_heads"] = found.get("num_attention_heads", values.get("num_attention_heads"))
    return {name: value for name, value in found.items() if value != values.get(name)}


def _tiny_list(name: str, values: list[Any], kept: int) -> list[Any]:
    """Of a list with one entry a layer, or of one that names layers by number."""
    if all(type(item) is int for item in values) and values == sorted(set(values)):
        return [item for item in values if item < kept]
    return [_tiny_size(name, item) if type(item) is int else item for item in values[:kept]]


def _layers_to_keep(values: dict[str, Any], num_layers: int | None) -> int:
    """Two, or as many as show every kind of layer."""
    kept = 2
    for value in values.values():
        if isinstance(value, (list, tuple)) and len(value) == num_layers:
            kinds = [str(item) for item in value]
            if len(set(kinds)) <= _MOST_KINDS:  # else it lists numbers of layers
                kept = max(kept, *(kinds.index(kind) + 1 for kind in kinds))
    return min(kept, 8)


def _tiny_size(name: str, value: int) -> int:
    return next((min(value, size) for pattern, size in _PATTERNS if pattern.match(name)), value)


def _tiny_ids(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_tiny_ids(item) for item in value]
    return value % VOCAB if type(value) is int and value >= VOCAB else value
