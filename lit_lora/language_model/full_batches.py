"""Greedy answers with the batch kept full: a row leaves once it has its answer, and waiting prompts take its place.

transformers' ``generate`` computes each row until the last one of the batch has its answer. On a CPU, where a step
costs by its rows, much of that work is for answers that are there already. What the prompts that enter together begin
with, a system prompt mostly, is read once.

Shapes: B rows, H key heads, L places of the cache, E head dimension, V vocab; the places before what a prompt that is
shorter than others has of its own are masked.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lit_lora.base.shards import is_sharded

_ROOM = 64
"""Places that memory is set aside for beyond those that are used."""

_WORTH_A_PASS = 64
"""Tokens that a pass over a shared beginning has to save."""

_ENOUGH_TOKENS = 2**10
"""That prompts are read with: a product of more is not faster."""

_SAME_LENGTH = 1.1
"""Longer than another prompt by this factor is worth not padding to it."""

_TOKENS = 2**14
"""Places of a batch, in the memory of which there are keys and values of each layer."""

_FEWEST_ROWS, _MOST_ROWS = 4, 128


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
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most likely tokens after each prompt, with those that end the answer.

    Args:
        model: in evaluation mode, and one that :func:`can_be_kept_full`.
        prompts: token ids of each.
        has_ended: whether these tokens are a whole answer.
        max_new_tokens: longest answer.
        batch_size: prompts at a time; those of similar length enter together. By default as many as have room in
            16,384 tokens with their longest answers, 4 to 128: the more rows a product has, the less each costs.
        progress: called with the number of answers that are there.
    """
    if batch_size is None:
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        batch_size = min(max(_TOKENS // longest, _FEWEST_ROWS), _MOST_ROWS)
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = deque(sorted(range(len(prompts)), key=lambda index: len(prompts[index])))
    batch, num_answered = _Batch(model), 0
    while waiting or batch.rows:
        room = batch_size - len(batch.rows)
        if waiting and 4 * room >= batch_size:  # several at once: one prompt alone would not fill the products
            entering = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            for rows in _of_similar_length([_Row(prompts[index], answers[index]) for index in entering]):
                batch.enter(rows)
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


def _of_similar_length(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows, shortest prompts first, in groups that are read one after the other, so that little is padded."""
    group: list[_Row] = []
    for row in rows:
        length = len(row.prompt)
        if group and length > _SAME_LENGTH * len(group[0].prompt) and len(group) * length >= _ENOUGH_TOKENS:
            yield group
            group = []
        group.append(row)
    yield group


class _Batch:
    """Rows that are being answered, and the keys and values of what they hold."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.rows: list[_Row] = []
        self.layers: list[_Layer] = []
        self.mask_BL = torch.zeros((0, 0), dtype=torch.long)

    def enter(self, rows: list[_Row]) -> None:
        """Read the prompts of new rows, what all of them begin with once, and give each its first token."""
        layers = [_Layer() for _ in DynamicCache(config=self.model.config).layers]
        shared = _shared_beginning([row.prompt for row in rows])
        if shared:
            ids_1L = torch.tensor([rows[0].prompt[:shared]])
            self._logits(ids_1L, torch.ones_like(ids_1L), layers)
            for layer in layers:
                layer.repeat_row(len(rows))
        longest = max(len(row.prompt) for row in rows)
        ids_BL = torch.zeros((len(rows), longest), dtype=torch.long)
        mask_BL = torch.zeros_like(ids_BL)
        mask_BL[:, :shared] = 1
        for place, row in enumerate(rows):
            own = row.prompt[shared:]
            ids_BL[place, longest - len(own) :] = torch.tensor(own)
            mask_BL[place, longest - len(own) :] = 1
        self._answer(rows, ids_BL[:, shared:], mask_BL, layers)
        if self.rows:
            length = max(longest, self.mask_BL.shape[1])
            for layer, other in zip(layers, self.layers, strict=True):
                layer.put_before(other, length)
            masks = (self.mask_BL, mask_BL)
            mask_BL = torch.cat([pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        self.rows, self.layers, self.mask_BL = [*self.rows, *rows], layers, mask_BL

    def step(self) -> None:
        """Give each row its next token."""
        last_B1 = torch.tensor([row.answer[-1:] for row in self.rows])
        self.mask_BL = pad(self.mask_BL, (0, 1), value=1)
        self._answer(self.rows, last_B1, self.mask_BL, self.layers)

    def keep(self, places: list[int]) -> None:
        """Let the other rows go, and with them the places that only they had; the last rows move up."""
        order = list(range(len(places)))
        left = sorted(set(order) - set(places))
        moved = [place for place in places if place >= len(places)]
        for here, there in zip(left, moved, strict=True):
            order[here] = there
        self.rows, self.mask_BL = [self.rows[place] for place in order], self.mask_BL[order]
        unused = int(self.mask_BL.any(dim=0).int().argmax())
        self.mask_BL = self.mask_BL[:, unused:]
        for layer in self.layers:
            layer.keep(left, moved, len(order), unused)

    def _answer(self, rows: list[_Row], ids_BL: Tensor, mask_BL: Tensor, layers: list[_Layer]) -> None:
        logits_BV = self._logits(ids_BL, mask_BL, layers)[:, -1]
        for row, token in zip(rows, logits_BV.argmax(-1).tolist(), strict=True):
            row.answer.append(token)

    def _logits(self, ids_BL: Tensor, mask_BL: Tensor, layers: list[_Layer]) -> Tensor:
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp_min(0)[:, -ids_BL.shape[1] :]
        cache: Any = [*layers]
        logits: Tensor = self.model(
            input_ids=ids_BL,
            attention_mask=None if mask_BL.all() else mask_BL,
            past_key_values=Cache(layers=cache),
            use_cache=True,
            **({"position_ids": positions_BL} if self.takes_positions else {}),
            **self.options,
        ).logits
        return logits


def _shared_beginning(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts begin with; 0 where a pass of their own costs more than it saves."""
    but_last = (prompt[:-1] for prompt in prompts)  # each has at least the last one left to read
    shared = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*but_last, strict=False)))
    return shared if shared * (len(prompts) - 1) >= _WORTH_A_PASS else 0


class _Layer(DynamicLayer):
    """Keys and values of a layer, ``(B, H, L, E)``, as views of memory that has room for more places.

    A new token is written there, and a row that leaves is overwritten by the last one: transformers' own layer copies
    what all rows hold each time. A layer that uses the keys and values of an earlier one stays empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[Tensor] = []
        self.start = 0
        """Of the first place in the memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the keys and values of new places, and return all."""
        held, num_new, new = self.get_seq_length(), key_states.shape[-2], (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.stores or self.start + held + num_new > self.stores[0].shape[-2]:
            self._move(new, len(key_states), held + num_new)
        end = self.start + held + num_new
        for store, x in zip(self.stores, new, strict=True):
            store[: len(x), :, end - num_new : end] = x
        return self._see(len(key_states), end)

    def repeat_row(self, num_rows: int) -> None:
        """The only row, so often."""
        if self.stores:
            held = self.get_seq_length()
            self._move(self._seen(), num_rows, held)
            self._see(num_rows, held)

    def put_before(self, other: _Layer, length: int) -> None:
        """The rows of another one come before these; both get ``length`` places, zeros first."""
        if own := self._seen():
            pairs = list(zip(other._seen(), own, strict=True))
            num_rows, self.start = sum(len(x) for x in pairs[0]), 0
            self.stores = [_room(first, num_rows, length) for first, _ in pairs]
            for store, (first, second) in zip(self.stores, pairs, strict=True):
                for rows, x in ((store[: len(first)], first), (store[len(first) :], second)):
                    missing = length - x.shape[-2]
                    rows[..., :missing, :] = 0  # masked, and yet multiplied
                    rows[..., missing:length, :] = x
            self._see(num_rows, length)

    def keep(self, left: list[int], moved: list[int], num_rows: int, unused: int) -> None:
        """Put rows ``moved`` where rows ``left`` are, and see ``num_rows`` without the first ``unused`` places."""
        if self.stores:
            for x in self._seen() if left else ():
                x[left] = x[moved]
            end = self.start + self.get_seq_length()
            self.start += unused
            self._see(num_rows, end)

    def _move(self, like: Sequence[Tensor], num_rows: int, num_places: int) -> None:
        """Into new memory, for tensors such as ``like``; a single row becomes all of them."""
        old, held = self._seen(), self.get_seq_length()
        self.stores, self.start = [_room(x, num_rows, num_places) for x in like], 0
        for store, x in zip(self.stores, old, strict=False):  # of a new layer there is nothing yet
            store[..., :held, :] = x

    def _see(self, num_rows: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (store[:num_rows, :, self.start : end] for store in self.stores)
        self.keys, self.values = keys, values
        return keys, values

    def _seen(self) -> list[Tensor]:
        return [x for x in (self.keys, self.values) if x is not None] if self.stores else []


def _room(like: Tensor, num_rows: int, num_places: int) -> Tensor:
    _, num_heads, _, width = like.shape
    return like.new_empty((num_rows, num_heads, num_places + _ROOM, width))
