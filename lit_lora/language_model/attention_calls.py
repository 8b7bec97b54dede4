"""What a model asks of its attention, and up to which length of an example a packed batch gives it that.

A sliding window can be told in two ways: as an argument of the attention call, which ``attention.py`` keeps to, or by
the mask alone, which a packed batch does without. A chunk is always told by the mask alone. Either shows only in rows
that are longer, of thousands of tokens for most models.

So the model runs once on a short row, with an attention that gives zeros and masks that remember by which rule they
were made: transformers writes a mask as a rule over the indices of a query and a key. The rule is then compared with
what packed attention computes, for rows of any length, without running the model on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from lit_lora.base.attention_choice import attention_implementation
from lit_lora.base.whose_error import ask
from lit_lora.language_model.attention import CannotPack

MaskRule = Callable[[Any, Any, Any, Any], Any]
"""Indices of batch row, head, query and key -> whether that query sees that key."""

_NAME = "lit_lora_recorded"
_LONGEST = 2**17
"""Tokens of the longest row that rules are compared for."""


class AttentionCall(NamedTuple):
    """How one layer asks for its attention."""

    rule: MaskRule | None
    """By which its mask was made; None for a mask of the model's own."""
    window: int | None
    """The argument ``sliding_window``."""


def record_calls(model: PreTrainedModel, input_ids: Tensor) -> list[AttentionCall]:
    """Every attention call of the model on this row, ``(1, L)``; none if its attention cannot be chosen."""
    recorder = _Recorder()
    AttentionInterface.register(_NAME, recorder.attend)
    AttentionMaskInterface.register(_NAME, recorder.make_mask)
    with attention_implementation(model, _NAME):
        # With a mask of ones transformers need not look whether the row is a packed one.
        ask(model, input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False)
    return recorder.calls


def packable_up_to(calls: list[AttentionCall], device: torch.device) -> int | None:
    """Tokens of the longest example whose attention is the same over a packed batch; None for any.

    Raises:
        CannotPack: if that cannot be told.
    """
    if not calls:
        raise CannotPack("its attention cannot be chosen")
    lengths = []
    for rule, window in dict.fromkeys(calls):
        if rule is None:
            raise CannotPack("it makes an attention mask of its own")
        lengths.append(_first_difference(rule, window, device))
    return min((length for length in lengths if length is not None), default=None)


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self._masks: list[tuple[Tensor, MaskRule]] = []

    def make_mask(self, *args: Any, mask_function: MaskRule = causal_mask_function, **kwargs: Any) -> Tensor | None:
        kwargs |= {"mask_function": mask_function, "allow_is_causal_skip": False}
        mask = sdpa_mask(*args, **kwargs)
        if mask is not None:
            self._masks.append((mask, mask_function))
        return mask

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.calls.append(AttentionCall(self._rule_of(attention_mask), kwargs.get("sliding_window")))
        batch_size, num_heads, length, _ = query.shape
        return value.new_zeros(batch_size, length, num_heads, value.shape[-1]), None

    def _rule_of(self, attention_mask: Any) -> MaskRule | None:
        if attention_mask is None:
            return causal_mask_function
        for mask, rule in self._masks:
            # A layer may have cut the mask to the length of its keys, which is the whole.
            if mask.shape == attention_mask.shape and _storage(mask) == _storage(attention_mask):
                return rule
        return None


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _first_difference(rule: MaskRule, window: int | None, device: torch.device) -> int | None:
    """The first query that by the rule sees other keys than under causal attention with this window; None for none."""
    same = -1
    for query in (2**power - 1 for power in range(_LONGEST.bit_length())):
        if _differs(rule, window, query, device):
            break
        same = query
    else:
        return None
    different = query
    while different - same > 1:
        middle = (same + different) // 2
        if _differs(rule, window, middle, device):
            different = middle
        else:
            same = middle
    if different == 0:
        raise CannotPack("its attention is not causal")
    return different


def _differs(rule: MaskRule, window: int | None, query: int, device: torch.device) -> bool:
    keys = torch.arange(query + 1, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    expected = keys > query - window if window is not None else torch.ones_like(keys, dtype=torch.bool)
    try:
        return not torch.equal(rule(first, first, keys[-1:], keys).expand_as(expected), expected)
    except (IndexError, RuntimeError) as error:  # it looks up what the short row held
        raise CannotPack("the mask of its attention depends on more than the distance of tokens") from error
