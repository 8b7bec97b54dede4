"""Greedy answers with the batch kept full: a row leaves once it has its answer, and waiting prompts take its place.

transformers' ``generate`` computes each row until the last one of the batch has its answer. On a CPU, where a step
costs by its rows, much of that work is for answers that are there already.

Shapes: B rows, L places of the cache; those before a prompt that is shorter than others are masked.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lit_lora.base.shards import is_sharded


def can_be_kept_full(model: PreTrainedModel) -> bool:
    """Whether the model is whole, on a CPU, and remembers keys and values of all places, as most do."""
    own = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    layers = () if model.config.is_encoder_decoder else DynamicCache(config=model.config).layers
    return (
        model.device.type == "cpu"
        and not is_sharded(model)
        and all(getattr(type(model), name, None) is getattr(GenerationMixin, name) for name in own)
        and bool(layers)
        and all(type(layer) is DynamicLayer for layer in layers)
    )


def complete_in_full_batches(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    has_ended: Callable[[list[int]], bool],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most likely tokens after each prompt, with those that end the answer.

    Args:
        model: in evaluation mode, and one that :func:`can_be_kept_full`.
        prompts: token ids of each.
        has_ended: whether these tokens are a whole answer.
        max_new_tokens: longest answer.
        batch_size: prompts at a time; those of similar length enter together.
        progress: called with the number of answers that are there.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = deque(sorted(range(len(prompts)), key=lambda index: len(prompts[index])))
    batch, num_answered = _Batch(model), 0
    while waiting or batch.rows:
        room = batch_size - len(batch.rows)
        if waiting and 4 * room >= batch_size:  # several at once: one prompt alone would not fill the products
            entering = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            batch.enter([_Row(prompts[index], answers[index]) for index in entering])
        else:
            batch.step()
        staying = [
            place
            for place, row in enumerate(batch.rows)
            if len(row.answer) < max_new_tokens and not has_ended(row.answer)
        ]
        if (left := len(batch.rows) - len(staying)) > 0:
            batch.keep(staying)
            num_answered += left
            if progress is not None:
                progress(num_answered)
    return answers


class _Row(NamedTuple):
    prompt: list[int]
    answer: list[int]
    """Tokens so far."""


class _Batch:
    """Rows that are being answered, and the keys and values of what they hold."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.rows: list[_Row] = []
        self.cache = DynamicCache(config=model.config)
        self.mask_BL = torch.zeros((0, 0), dtype=torch.long)

    def enter(self, rows: list[_Row]) -> None:
        """Read the prompts of new rows, and give each its first token."""
        longest = max(len(row.prompt) for row in rows)
        ids_BL = torch.zeros((len(rows), longest), dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        for place, row in enumerate(rows):
            ids_BL[place, longest - len(row.prompt) :] = torch.tensor(row.prompt)
            mask_BL[place, longest - len(row.prompt) :] = 1
        cache = DynamicCache(config=self.model.config)
        self._run(rows, ids_BL, mask_BL, cache)
        if self.rows:
            length = max(longest, self.mask_BL.shape[1])
            cache = _over_pairs(lambda *pair: torch.cat([_padded(x, length) for x in pair]), self.cache, cache)
            mask_BL = torch.cat([_padded(mask[..., None], length)[..., 0] for mask in (self.mask_BL, mask_BL)])
        self.rows, self.cache, self.mask_BL = [*self.rows, *rows], cache, mask_BL

    def step(self) -> None:
        """Give each row its next token."""
        last_B1 = torch.tensor([row.answer[-1:] for row in self.rows])
        self.mask_BL = pad(self.mask_BL, (0, 1), value=1)
        self._run(self.rows, last_B1, self.mask_BL, self.cache)

    def keep(self, places: list[int]) -> None:
        """Let the other rows go, and with them the places that only they had."""
        self.rows, self.mask_BL = [self.rows[place] for place in places], self.mask_BL[places]
        unused = int(self.mask_BL.any(dim=0).int().argmax())
        self.mask_BL = self.mask_BL[:, unused:]
        self.cache = _over_pairs(lambda x: x[places, :, unused:], self.cache)

    def _run(self, rows: list[_Row], ids_BL: Tensor, mask_BL: Tensor, cache: DynamicCache) -> None:
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp_min(0)[:, -ids_BL.shape[1] :]
        logits = self.model(
            input_ids=ids_BL,
            attention_mask=None if mask_BL.all() else mask_BL,
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions_BL} if self.takes_positions else {}),
            **self.options,
        ).logits
        for row, token in zip(rows, logits[:, -1].float().argmax(-1).tolist(), strict=True):
            row.answer.append(token)


def _padded(x_BHLD: Tensor, length: int) -> Tensor:
    """With zeros before it, ``length`` places."""
    return pad(x_BHLD, (0, 0, length - x_BHLD.shape[-2], 0))


def _over_pairs(function: Callable[..., Tensor], *caches: DynamicCache) -> DynamicCache:
    """A cache of what ``function`` makes of the keys, and of the values, of each layer."""
    made: list[tuple[Tensor | None, ...]] = []
    for layers in zip(*caches, strict=True):
        there = layers[0][0] is not None  # some layers use the keys and values of an earlier one
        made.append(tuple(function(*(layer[i] for layer in layers)) if there else None for i in (0, 1)))
    return DynamicCache(made)
