"""Attention of one new token to all before it, on a CPU: the queries that share a key head take the places of tokens.

torch's kernel for a CPU goes through the keys of a head once for each of its queries, so a model with three to a head
reads them three times, and has no two places to compute at once. Taken for three tokens that see the same they are read
once: of 100 rows and 41 to 73 places (SmolLM2-135M, Zen 4) a step takes 200 ms in place of 280. transformers does so
where there is a mask, and not where no row is padded.

Shapes: B rows, H query heads, K key and value heads, L places, E head dimension.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lit_lora.base.attention_choice import attention_implementation, implementations
from lit_lora.base.shards import is_sharded

IMPLEMENTATION = "lit_lora_answering"


def answering_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within, ``model`` attends so: if it is whole, on a CPU, and computes by the attention that torch has."""
    on_cpu = model.device.type == "cpu" and not is_sharded(model)  # whose shares may wait there for another device
    if on_cpu and model.is_backend_compatible() and implementations(model) == {"sdpa"}:
        return attention_implementation(model, IMPLEMENTATION)
    return nullcontext()


def answering_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        module: the attention layer.
        query: ``(B, H, 1, E)``; of more tokens for prompts.
        key: ``(B, K, L, E)``.
        value: ``(B, K, L, E)``.
        attention_mask: as for ``scaled_dot_product_attention``.
        dropout: probability on the attention weights.
        scaling: factor on the scores; 1/sqrt(E) by default.
        kwargs: what else the model says of the call.

    Returns:
        ``(B, 1, H, E)``, and None in the place of attention weights.
    """
    groups = query.shape[1] // key.shape[1]
    others = dropout or any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attention_mask is None and query.shape[2] == 1 and groups > 1 and not others:
        query_BKGE = query.reshape(len(query), -1, groups, query.shape[-1])
        out_BKGE = F.scaled_dot_product_attention(query_BKGE, key, value, scale=scaling)
        return out_BKGE.reshape(len(query), 1, -1, value.shape[-1]), None
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATION, answering_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
