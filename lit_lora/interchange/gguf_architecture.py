"""Which models can be written as GGUF, and what llama.cpp expects of their tensors and metadata.

A kind is in the table once its logits in llama.cpp were compared with those of transformers
(``tests/consumers/test_tiny_models.py``). What llama.cpp computes in one way only is a condition on the config.
"""

from __future__ import annotations

import re
from typing import Any

import gguf
import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lit_lora.interchange.gguf_kinds import KINDS, Kind

_NO_LIMIT = 2048
"""Of BLOOM, which has no length in its config: what it was trained with."""
_EXPERT = re.compile(r"(\.experts)\.(\d+)\.")


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
        if name not in KINDS:
            raise ValueError(_cannot(f"its architecture {name} is not one of {', '.join(KINDS)}"))
        self.kind: Kind = KINDS[name]
        self.head_dim = getattr(config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        self._check()
        self.rope = _flat(getattr(config, "rope_parameters", None))
        self.rope_factors = self._rope_factors()
        self._names = gguf.get_tensor_name_map(self.kind.arch, self.config.num_hidden_layers)

    @property
    def name(self) -> str:
        """As in ``general.architecture``."""
        return gguf.MODEL_ARCH_NAMES[self.kind.arch]

    def tensor_name(self, name: str) -> str:
        """A tensor's name in GGUF.

        Raises:
            ValueError: if it has none.
        """
        found = self._names.get_name(self.kind.renamed(name), try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(_cannot(f"it has a tensor {name}, for which there is no name"))
        return found

    def place(self, name: str) -> tuple[str, int | None]:
        """A tensor's name in GGUF, and where several experts share one, the number of its expert."""
        expert = _EXPERT.search(name)
        return self.tensor_name(_EXPERT.sub(r"\1.", name)), int(expert[2]) if expert else None

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as llama.cpp computes with it."""
        return self.kind.values(name, self.rows(name, tensor))

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor, or the half of an adapter that makes its outputs, with its rows in the order of llama.cpp."""
        return self.kind.rows(self.config, name, tensor)

    def write(self, writer: GGUFWriter) -> None:
        """Put it into the metadata of a file."""
        config = self.config
        kind, heads = self.kind, config.num_attention_heads
        writer.add_context_length(getattr(config, "max_position_embeddings", _NO_LIMIT))
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(
            (kind.feed_forward and getattr(config, kind.feed_forward)) or 4 * config.hidden_size
        )
        writer.add_head_count(heads)
        writer.add_head_count_kv(config.num_key_value_heads if kind.grouped else heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        epsilon = getattr(config, kind.epsilon)
        (writer.add_layer_norm_rms_eps if kind.epsilon == "rms_norm_eps" else writer.add_layer_norm_eps)(epsilon)
        writer.add_vocab_size(config.vocab_size)
        if self.rope is not None:
            writer.add_rope_dimension_count(int(self.head_dim * self.rope.get("partial_rotary_factor", 1.0)))
            writer.add_rope_freq_base(self.rope["rope_theta"])
        kind.metadata(config, writer)

    def _check(self) -> None:
        """Check all that the kind asks for.

        Raises:
            ValueError: naming the first field that is otherwise.
        """
        config, kind = self.config, self.kind
        for field, allowed in kind.wants.items():
            value = getattr(config, field, None)
            if value not in allowed:
                raise ValueError(_cannot(f"{field} is {value}, expected {' or '.join(map(str, allowed))}"))
        for field in kind.needs:
            if not getattr(config, field):
                raise ValueError(_cannot(f"{field} is {getattr(config, field)}, expected a number"))
        if not kind.windows and _sees_a_window(config):
            raise ValueError(_cannot("its attention sees a sliding window, which llama.cpp would ignore"))
        if not kind.any_head_dim and self.head_dim * config.num_attention_heads != config.hidden_size:
            raise ValueError(_cannot(f"head_dim is {self.head_dim}, expected hidden_size by num_attention_heads"))
        scalar = getattr(config, "query_pre_attn_scalar", None)
        if scalar is not None:
            # llama.cpp knows the largest Gemma by its number of layers.
            largest = config.num_hidden_layers == kind.layers_of_largest
            expected = config.hidden_size // config.num_attention_heads if largest else self.head_dim
            if scalar != expected:
                raise ValueError(_cannot(f"query_pre_attn_scalar is {scalar}, expected {expected}"))

    def _rope_factors(self) -> Tensor | None:
        """What each frequency is divided by; None for nothing."""
        if self.rope is None:
            return None
        how = self.rope.get("rope_type", "default")
        of_windows = self.config.rope_parameters.get("sliding_attention", {}).get("rope_type", "default")
        if of_windows != "default":
            raise ValueError(_cannot(f"its positions are scaled ({of_windows}) where it sees a window"))
        if self.rope.get("partial_rotary_factor", 1.0) != 1.0 and not self.kind.partial_rope:
            raise ValueError(_cannot("it rotates a part of each head alone"))
        if how in ("default", *self.kind.rope_types):
            return None
        if how not in self.kind.rope_factors:
            raise ValueError(
                _cannot(f"its positions are scaled ({how}); Llama's linear and llama3, Gemma 3's linear can be")
            )
        scaled, attention_factor = ROPE_INIT_FUNCTIONS[how](self.config, torch.device("cpu"))
        assert attention_factor == 1.0, attention_factor
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        return (1.0 / self.rope["rope_theta"] ** exponents) / scaled


def _flat(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of layers that see everything, where layers differ."""
    return None if not rope else rope.get("full_attention", rope)


def _sees_a_window(config: Any) -> bool:
    """Whether a token may be out of sight of another that comes later."""
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return bool(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    return window < config.max_position_embeddings


def _cannot(reason: str) -> str:
    return f"this model cannot be written as GGUF: {reason}. Serve the merged model (--to hf) with transformers or vLLM"
