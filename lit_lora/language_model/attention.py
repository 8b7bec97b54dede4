"""Attention over a packed batch: examples lie one after another in one row, and none sees another.

transformers lets a model's attention be chosen by name, so nothing of the model is patched: within
``packed_attention`` a model computes its attention here, and outside of it as it always did. That is why generation,
padded batches and a saved config are what they would be without packing. Layers that are recomputed in the backward
pass find the choice of their forward pass again (``selection_for_recompute``).

A call is computed per example from the offsets that come with it. One that asks for something else than a causal
attention with a window, a soft cap and a scale (sinks, a bias, keys of another length, a mask of the model's own) is
refused with ``CannotPack``: the trial before a run (``trial.py``) then pads.

Which kernel: half precision on CUDA takes ``varlen_attention.py``, one launch for all examples, on cards that have
FlashAttention. A CPU takes ``flash_attention.py`` in full precision, ``blockwise_attention.py`` where that is faster,
as in bfloat16. Elsewhere each example goes through ``scaled_dot_product_attention``, with key and value heads repeated
but for FlashAttention: a CPU's grouped-query backward is three times slower than the copy, and CUDA's other kernels
refuse grouped queries, which leaves one whose memory is quadratic. Soft-capped scores, and the sliding windows that are
left, take a plain masked product, made again in the backward pass so that its scores are not kept.

On a CPU the examples of a batch may share their beginning, which then is there once (``shared_prefix``).

Shapes: T tokens of the batch, H query heads, K key and value heads, E head dimension, L length of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lit_lora.base.attention_choice import attention_implementation
from lit_lora.base.quantized_linear import autocast_dtype
from lit_lora.kernels.blockwise_attention import blockwise_attention, is_faster
from lit_lora.kernels.cuda_cards import has_flash_attention
from lit_lora.kernels.cuda_stand_ins import is_on_cuda
from lit_lora.kernels.flash_attention import flash_attention
from lit_lora.kernels.varlen_attention import serves
from lit_lora.kernels.varlen_attention import varlen_attention as _varlen

IMPLEMENTATION = "lit_lora_packed"

_KNOWN_TENSORS = ("position_ids", "cache_position", "position_embeddings", "cu_seq_lens_k", "logits_to_keep")
"""Arguments that models hand on to their attention and that a packed one needs not: positions are in queries and keys
already."""


class CannotPack(ValueError):
    """A model asks of its attention what cannot be computed over a packed batch; says what."""


def packed_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within, ``model`` computes its attention with :func:`packed_attention_forward`."""
    return attention_implementation(model, IMPLEMENTATION)


def no_mask(device: torch.device) -> Tensor:
    """What to give a model as attention mask of a packed batch: four dimensions, so that the model makes none itself.

    Making one would cost memory quadratic in the tokens, and a question to the device whether the batch is packed.
    Without elements: an attention that is not ours cannot take it for a mask and compute something else unnoticed.
    """
    return torch.zeros((1, 1, 0, 0), device=device)


def _refuse_mask(*_: object, **__: object) -> NoReturn:
    raise CannotPack("it makes an attention mask of its own")


class SeqLens:
    """The lengths of a packed batch's examples, tokens, as Python numbers: no device needs to be asked.

    With ``shared_prefix``, the first example has so many tokens and is the beginning of each of the others.
    Without ``lengths`` the tensor of offsets alone tells them, and ``longest`` is as long as one may be: what is
    recorded of such a batch serves others.

    An object that ``torch.compile`` does not look into: for a list it would compile again when its length changes.
    """

    __slots__ = ("lengths", "longest", "shared_prefix")

    def __init__(self, lengths: list[int] | None, shared_prefix: int = 0, longest: int = 0) -> None:
        self.lengths = lengths
        self.longest = longest if lengths is None else shared_prefix + max(lengths)
        self.shared_prefix = shared_prefix


@torch.compiler.disable(reason="one kernel call per example: traced, each number of examples would be compiled anew")
def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    seq_lens: SeqLens | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed batches.

    Args:
        module: the attention layer.
        query: ``(1, H, T, E)``.
        key: ``(1, K, T, E)``.
        value: ``(1, K, T, E)``.
        attention_mask: what ``no_mask`` made.
        scaling: factor on the scores; 1/sqrt(E) by default.
        dropout: probability on the attention weights.
        cu_seq_lens_q: where examples start and end, ``(N + 1,)`` int32.
        seq_lens: the examples' lengths, and how much of them is shared.
        sliding_window: tokens that a token sees, itself included; None for all.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        kwargs: what else the model says of the call.

    Returns:
        ``(1, T, H, E)``, and None in the place of attention weights.

    Raises:
        CannotPack: if the call asks for more than that.
    """
    if cu_seq_lens_q is None or seq_lens is None:
        raise CannotPack("it does not hand on to its attention where examples begin")
    _check_call(query, key, value, attention_mask, kwargs)
    autocast = autocast_dtype(query)
    if autocast is not None:  # queries are float32 behind float32 rotary positions
        query, key, value = query.to(autocast), key.to(autocast), value.to(autocast)
    lengths, shared_prefix, longest = seq_lens.lengths, seq_lens.shared_prefix, seq_lens.longest
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    plain = window is None and softcap is None and dropout == 0.0
    if softcap is None and dropout == 0.0 and serves(query, value, scaling=scaling, window=window):
        return _varlen(query, key, value, cu_seq_lens_q, longest, scaling, window), None
    if lengths is None:
        raise CannotPack("its attention goes through the examples one by one")
    equal_widths = value.shape[-1] == query.shape[-1]
    on_cpu = query.device.type == "cpu" and not is_on_cuda(query)
    if equal_widths and plain and on_cpu and (attend := _of_a_cpu(query.dtype, longest, shared_prefix)):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(query, key, value, lengths, shared_prefix=shared_prefix, scaling=scaling), None
    return _per_example(query, key, value, lengths, shared_prefix, scaling, dropout, window, softcap), None


def _of_a_cpu(dtype: torch.dtype, longest: int, shared_prefix: int) -> Callable[..., Tensor] | None:
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        return None
    half = dtype is torch.bfloat16
    if is_faster(longest, dtype) or (half and shared_prefix):
        return blockwise_attention
    return None if half else flash_attention


def _check_call(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.numel():
        raise CannotPack("it makes an attention mask of its own")
    if query.ndim != 4 or query.shape[0] != 1:
        raise CannotPack(
            f"its attention takes queries of shape {tuple(query.shape)}, in place of (1, heads, tokens, width)"
        )
    same = key.shape[:3] == value.shape[:3] and key.shape[::2] == query.shape[::2] and key.shape[-1] == query.shape[-1]
    if not same or query.shape[1] % key.shape[1]:
        raise CannotPack(
            f"its attention takes keys of shape {tuple(key.shape)} and values of {tuple(value.shape)} with queries of "
            f"{tuple(query.shape)}"
        )
    unknown = [name for name, argument in others.items() if isinstance(argument, Tensor) and name not in _KNOWN_TENSORS]
    if unknown:
        raise CannotPack(f"its attention takes {', '.join(unknown)}")
    if others.get("is_causal") is False:
        raise CannotPack("its attention is not causal")


def _per_example(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_lens: list[int],
    shared_prefix: int,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    flash = has_flash_attention(query)
    if key.shape[1] != query.shape[1] and not flash:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    # split, not slices: the backward of a split is one concatenation, that of a slice a full-size zero tensor each.
    keys, values = key.split(seq_lens, 2), value.split(seq_lens, 2)
    for index, (q, k, v) in enumerate(zip(query.split(seq_lens, 2), keys, values, strict=True)):
        if index and shared_prefix:
            k, v = torch.cat([keys[0], k], dim=2), torch.cat([values[0], v], dim=2)
        if window is None and softcap is None and k.shape[2] == q.shape[2]:
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=gqa
            )
        else:
            masked = partial(_masked_attention, scaling=scaling, dropout=dropout, window=window, softcap=softcap)
            # Made again in the backward pass: scores are quadratic in the tokens, and there are several of them.
            out = checkpoint(masked, q, k, v, use_reentrant=False, preserve_rng_state=dropout > 0)
        outputs.append(out.transpose(1, 2))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).contiguous()


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores_HLL = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_HLL = softcap * torch.tanh(scores_HLL / softcap)
    position = torch.arange(key.shape[2], device=query.device)
    distance_LL = position[-query.shape[2] :, None] - position[None, :]  # queries are the last of the keys
    visible_LL = (distance_LL >= 0) if window is None else (distance_LL >= 0) & (distance_LL < window)
    precise = torch.promote_types(scores_HLL.dtype, torch.float32)
    weights_HLL = scores_HLL.masked_fill(~visible_LL, float("-inf")).softmax(dim=-1, dtype=precise)
    return F.dropout(weights_HLL.to(query.dtype), dropout) @ value


AttentionInterface.register(IMPLEMENTATION, packed_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _refuse_mask)
