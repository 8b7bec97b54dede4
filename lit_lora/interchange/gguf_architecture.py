"""Which models can be written as GGUF, under which of its names, and what its readers expect of their tensors."""

from __future__ import annotations

from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH, GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA,
    "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}
"""Class in transformers -> name in GGUF."""

_TURNED = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
"""Layers whose outputs llama.cpp wants in another order -> field with the number of their heads."""


class Architecture:
    """A model's architecture in words of GGUF.

    Args:
        config: of the model.

    Raises:
        ValueError: naming what GGUF, or llama.cpp, cannot express of it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config: Any = config
        name = next(iter(config.architectures or [type(config).__name__]))
        if name not in ARCHITECTURES:
            raise ValueError(_cannot(f"its architecture {name} is not one of {', '.join(ARCHITECTURES)}"))
        self.kind = ARCHITECTURES[name]
        if self.config.hidden_act != "silu":
            raise ValueError(_cannot(f"hidden_act is {self.config.hidden_act}, expected silu"))
        sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if sliding or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(_cannot("its attention sees a sliding window, which llama.cpp would ignore"))
        self.head_dim = getattr(config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        self.rope_factors = self._rope_factors()
        self._names = gguf.get_tensor_name_map(self.kind, self.config.num_hidden_layers)

    @property
    def name(self) -> str:
        """As in ``general.architecture``."""
        return gguf.MODEL_ARCH_NAMES[self.kind]

    def tensor_name(self, name: str) -> str:
        """A tensor's name in GGUF.

        Raises:
            ValueError: if it has none.
        """
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(_cannot(f"it has a tensor {name}, for which there is no name"))
        return found

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with its rows in the order that llama.cpp rotates positions in: pairs beside each other."""
        heads = next((field for layer, field in _TURNED.items() if f".{layer}." in name), None)
        if self.kind is not MODEL_ARCH.LLAMA or heads is None:
            return tensor
        halves = tensor.reshape(getattr(self.config, heads), 2, -1, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    def write(self, writer: GGUFWriter) -> None:
        """Put it into the metadata of a file."""
        config = self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)

    def _rope_factors(self) -> Tensor | None:
        """What each frequency is divided by; None for nothing."""
        rope = self.config.rope_parameters
        kind = rope.get("rope_type", "default")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(_cannot("it rotates a part of each head alone"))
        if kind == "default":
            return None
        if kind not in ("linear", "llama3") or self.kind is not MODEL_ARCH.LLAMA:
            raise ValueError(_cannot(f"its positions are scaled ({kind}); linear and llama3 of Llama can be written"))
        scaled, attention_factor = ROPE_INIT_FUNCTIONS[kind](self.config, torch.device("cpu"))
        assert attention_factor == 1.0, attention_factor
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return (1.0 / rope["rope_theta"] ** exponents) / scaled


def _cannot(reason: str) -> str:
    return f"this model cannot be written as GGUF: {reason}. Serve the merged model (--to hf) with transformers or vLLM"
