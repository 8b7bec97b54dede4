"""What a batch is: a micro-batch of examples, as the collators make it and a language model takes it.

Shape letters: B rows, L tokens in a row, N examples, S supervised tokens. A packed batch has one row that holds all
examples one after another; a padded one has a row an example. Integers are int64 unless it says otherwise.
"""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """Of the layouts: ``position_ids``, ``cu_seq_lens`` and ``seq_lens`` are of a packed batch, ``attention_mask`` of a
    padded one. ``labels`` are what collators of transformers give in place of targets."""

    input_ids: Tensor
    """``(B, L)``."""

    attention_mask: Tensor
    """``(B, L)``: 1 for real tokens, 0 for padding."""

    position_ids: Tensor
    """``(1, L)``: counted from 0 in each example."""

    cu_seq_lens: Tensor
    """``(N + 1,)``, int32: where each example begins in the row, and where the last one ends."""

    seq_lens: list[int]
    """The same as lengths, tokens: plain numbers, so that no device needs to be asked."""

    longest: int
    """As long as an example may be, tokens, in a packed batch whose ``cu_seq_lens`` alone tell the lengths."""

    shared_prefix: int
    """Tokens that all examples begin with, where the row holds them once."""

    target_positions: Tensor
    """``(S,)``: indices into the flattened row or rows, from which the next token is predicted."""

    target_ids: Tensor
    """``(S,)``: what is to be predicted there."""

    target_weights: Tensor
    """``(S,)``, float32: how much each of them counts in the loss; not there where each counts once."""

    labels: Tensor
    """``(B, L)``: token ids, -100 where unsupervised; a label belongs to the token that it stands at."""

    example_ids: Tensor
    """``(N,)``: which examples of the data these are."""

    num_tokens: int
    """Tokens that are not padding, for rates."""

    source: int
    """Which source of the data the examples are from; of one that is trained on, the first's."""
