"""Collators: examples to one batch, packed without padding or padded to the longest.

Shape letters: B rows, L tokens in a row, T tokens in a packed batch, N examples, S supervised tokens.

Both give the places of the predictions with the batch: ``target_positions`` (S,) are the indices in the flattened (B *
L) sequence from which the next token is predicted, ``target_ids`` (S,) what is to be predicted there, and where an
example has weights, ``target_weights`` (S,) how much that counts. A prediction never crosses from one example into the
next. What follows the last supervised token of an example is cut off: attention is causal, so it cannot matter. An
example without any supervised token is a filler (a rank that has run out of
data): one token, no target, counted as no token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lit_lora.batch import Batch
from lit_lora.data.prepared.dataset import TokenizedExample


def collate_packed(examples: Sequence[TokenizedExample]) -> Batch:
    """All examples in one row, ``(1, T)``, with ``position_ids`` that restart, and the borders.

    ``cu_seq_lens`` has them as a tensor, ``seq_lens`` as plain lengths, so that no layer has to ask a device.
    """
    lengths = [kept_length(example) for example in examples]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([example.ids[:length] for example, length in zip(examples, lengths, strict=True)])
    positions = np.concatenate([np.arange(length) for length in lengths])
    return {
        "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
        "position_ids": torch.from_numpy(positions.astype(np.int64))[None],
        "cu_seq_lens": torch.from_numpy(offsets.astype(np.int32)),
        "seq_lens": lengths,
        **_targets(examples, lengths, offsets[:-1]),
    }


def collate_padded(examples: Sequence[TokenizedExample]) -> Batch:
    """One row an example, ``(N, L)``, padded on the right with id 0, and ``attention_mask`` of the real tokens."""
    lengths = [kept_length(example) for example in examples]
    ids = np.zeros((len(examples), max(lengths)), dtype=np.int64)
    for row, example, length in zip(ids, examples, lengths, strict=True):
        row[:length] = example.ids[:length]
    attention_mask = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(attention_mask.astype(np.int64)),
        **_targets(examples, lengths, np.arange(len(examples)) * ids.shape[1]),
    }


def kept_length(example: TokenizedExample) -> int:
    """Tokens of an example up to the last supervised one: what a batch holds of it."""
    supervised = np.flatnonzero(example.mask)
    return int(supervised[-1]) + 1 if supervised.size else 1


def _targets(examples: Sequence[TokenizedExample], lengths: Sequence[int], starts: np.ndarray) -> Batch:
    """What both layouts share; ``starts`` is where each example begins in the flattened sequence."""
    supervised = [np.flatnonzero(example.mask) for example in examples]
    assert all(places.size == 0 or places[0] > 0 for places in supervised), "nothing predicts an example's first token"
    positions = np.concatenate([start + places - 1 for start, places in zip(starts, supervised, strict=True)])
    ids = np.concatenate([example.ids[places] for example, places in zip(examples, supervised, strict=True)])
    weighted: Batch = {}
    if any(example.weights is not None for example in examples):
        weights = [
            np.ones(len(places)) if example.weights is None else example.weights[places]
            for example, places in zip(examples, supervised, strict=True)
        ]
        weighted["target_weights"] = torch.from_numpy(np.concatenate(weights).astype(np.float32))
    return {
        **weighted,
        "target_positions": torch.from_numpy(positions.astype(np.int64)),
        "target_ids": torch.from_numpy(ids.astype(np.int64)),
        "example_ids": torch.tensor([example.example_id for example in examples], dtype=torch.int64),
        "num_tokens": sum(length for length, places in zip(lengths, supervised, strict=True) if places.size),
        "source": examples[0].source,
    }
