"""What each architecture that can be written as GGUF asks for: conditions, orders of rows, values, metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from torch import Tensor

_FUSED = ("query_key_value.",)
_TURNED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
"""Layers whose outputs llama.cpp wants in another order -> field with the number of their heads."""


def _as_they_are(config: Any, name: str, tensor: Tensor) -> Tensor:
    return tensor


def _pairs(config: Any, name: str, tensor: Tensor) -> Tensor:
    """Rows in the order that llama.cpp rotates positions in: pairs beside each other, not halves."""
    heads = next((heads for layer, heads in _TURNED.items() if f".{layer}." in name), None)
    if heads is None:
        return tensor
    halves = tensor.reshape(getattr(config, heads), 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _apart(config: Any, name: str, tensor: Tensor) -> Tensor:
    """All queries, all keys, all values, where a model has those of each head beside each other."""
    if not any(part in name for part in _FUSED):
        return tensor
    heads = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:])
    return heads.transpose(0, 1).reshape(tensor.shape)


def _unchanged(name: str, tensor: Tensor) -> Tensor:
    return tensor


def _plus_one(name: str, tensor: Tensor) -> Tensor:
    """Gemma multiplies by one more than a norm's weight."""
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """``Conv1D`` holds ``(in, out)``."""
    return tensor.t() if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else tensor


def _nothing(config: Any, writer: GGUFWriter) -> None:
    """No more than all kinds have."""


def _experts(config: Any, writer: GGUFWriter) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _gemma(config: Any, writer: GGUFWriter) -> None:
    """Windows, soft caps, and positions that differ between layers."""
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    full = config.rope_parameters.get("full_attention", {})
    if full.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(full["factor"])
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _parallel(config: Any, writer: GGUFWriter) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


@dataclass(frozen=True)
class Kind:
    """How llama.cpp reads one of its architectures."""

    arch: MODEL_ARCH
    wants: Mapping[str, tuple[Any, ...]]
    """Field of the config -> values that llama.cpp computes with."""
    epsilon: str = "rms_norm_eps"
    """Field of the config; of any other name it is that of a layer norm."""
    feed_forward: str | None = "intermediate_size"
    """Field of the config; where it is None, or there is none, four times ``hidden_size``."""
    grouped: bool = True
    """Whether several queries may share a key, by ``num_key_value_heads``."""
    rows: Callable[[Any, str, Tensor], Tensor] = _as_they_are
    """Puts the outputs of a layer into another order: of weights, biases, and B of adapters."""
    values: Callable[[str, Tensor], Tensor] = _unchanged
    """Changes a tensor of the model."""
    metadata: Callable[[Any, GGUFWriter], None] = _nothing
    """Writes what others do not have."""
    needs: tuple[str, ...] = ()
    """Fields of the config for which llama.cpp would take a value of its own."""
    windows: bool = False
    """Whether a sliding window is taken."""
    any_head_dim: bool = False
    """Whether heads may be of another size than all of them share ``hidden_size``."""
    partial_rope: bool = False
    """Whether a part of each head may be without position."""
    rope_types: tuple[str, ...] = ()
    """Scaled positions that ``metadata`` writes."""
    rope_factors: tuple[str, ...] = ()
    """Scaled positions that are written as a factor for each frequency."""
    layers_of_largest: int = 0
    """Of the size whose queries llama.cpp scales otherwise."""
    prefixes: Mapping[str, str] = field(default_factory=dict)
    """Part of a tensor's name -> what gguf's table of names has for it."""

    def renamed(self, name: str) -> str:
        """A name of transformers as gguf's table has it."""
        for part, other in self.prefixes.items():
            name = name.replace(part, other)
        return name


_SILU = {"hidden_act": ("silu",)}
_NO_BIAS = {"attention_bias": (False, None), "mlp_bias": (False, None)}
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
"""llama.cpp's GELU is the one by tanh, whatever a config says."""
_GEMMA = {
    "hidden_activation": _TANH, "use_bidirectional_attention": (None, False), "attention_bias": (False, None),
}  # fmt: skip

_LLAMA = Kind(MODEL_ARCH.LLAMA, _SILU, rows=_pairs, any_head_dim=True, rope_factors=("linear", "llama3"))
KINDS: dict[str, Kind] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": replace(_LLAMA, wants=_SILU | _NO_BIAS, metadata=_experts, rope_factors=()),
    "Qwen2ForCausalLM": Kind(MODEL_ARCH.QWEN2, _SILU, any_head_dim=True),
    "Qwen3ForCausalLM": Kind(MODEL_ARCH.QWEN3, _SILU | _NO_BIAS, any_head_dim=True),
    "Qwen3MoeForCausalLM": Kind(
        MODEL_ARCH.QWEN3MOE,
        _SILU | _NO_BIAS | {"norm_topk_prob": (True,), "mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
        metadata=_experts, any_head_dim=True,
    ),
    "Gemma2ForCausalLM": Kind(
        MODEL_ARCH.GEMMA2, _GEMMA | {"tie_word_embeddings": (True,)},
        values=_plus_one, metadata=_gemma, windows=True, any_head_dim=True, layers_of_largest=46,
        needs=("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "Gemma3ForCausalLM": Kind(
        MODEL_ARCH.GEMMA3, _GEMMA | {"attn_logit_softcapping": (None,)},
        values=_plus_one, metadata=_gemma, windows=True, any_head_dim=True, layers_of_largest=62,
        rope_types=("linear",),
    ),
    "Phi3ForCausalLM": Kind(MODEL_ARCH.PHI3, _SILU | _NO_BIAS, partial_rope=True),
    "Olmo2ForCausalLM": Kind(MODEL_ARCH.OLMO2, _SILU | _NO_BIAS | {"tie_word_embeddings": (False,)}),
    "Starcoder2ForCausalLM": Kind(MODEL_ARCH.STARCODER2, {"hidden_act": _TANH}, "norm_epsilon"),
    "GPT2LMHeadModel": Kind(
        MODEL_ARCH.GPT2,
        {"activation_function": _TANH, "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        "layer_norm_epsilon", "n_inner", grouped=False, values=_transposed,
    ),
    "GPTNeoXForCausalLM": Kind(
        MODEL_ARCH.GPTNEOX,
        {"hidden_act": _TANH, "attention_bias": (True,), "tie_word_embeddings": (False,)},
        "layer_norm_eps", grouped=False, rows=_apart, metadata=_parallel, partial_rope=True,
    ),
    "BloomForCausalLM": Kind(
        MODEL_ARCH.BLOOM, {"apply_residual_connection_post_layernorm": (False,)},
        "layer_norm_epsilon", None, grouped=False, rows=_apart, prefixes={"transformer.": ""},
    ),
}  # fmt: skip
"""Class in transformers -> how it is read."""
