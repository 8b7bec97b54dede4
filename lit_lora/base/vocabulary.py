"""A base with more rows in its embedding and head than it came with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_lora.base.shards import is_sharded, set_row_, whole
from lit_lora.wording import setting


def num_rows(model: Any) -> int:
    """Rows of the embedding."""
    return len(model.get_input_embeddings().weight)


@torch.no_grad()
def grow_vocabulary(model: Any, rows: int) -> None:
    """Give embedding and head of a transformers model at least this many rows; new ones are the mean of the others.

    Raises:
        ValueError: if they are not plain layers, or divided.
    """
    before = num_rows(model)
    if rows <= before:
        return
    if is_sharded(model):
        raise ValueError(
            f"the adapter has tokens up to {rows - 1}, the base model's vocabulary ends at {before - 1}, and a base "
            "that is divided among processes gets rows only where the adapter names them (trainable_token_indices), "
            "not for a whole embedding in its file: load it on one process"
        )
    for name, layer in {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}.items():
        if layer is not None and not isinstance(layer, (nn.Embedding, nn.Linear)):
            raise ValueError(
                f"tokens beyond the vocabulary of {before} need more rows, which a {name} of type "
                f"{type(layer).__name__} cannot get: leave {setting('model.quantization.embedding_bits')} unset"
            )
    with torch.random.fork_rng():  # the rows are drawn first
        model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in _weights(model):
        weight[before:] = weight[:before].float().mean(dim=0).to(weight.dtype)


@torch.no_grad()
def fill_rows(model: Any, pieces: Mapping[int, Sequence[int]]) -> None:
    """Let rows begin as the mean of others.

    Args:
        model: of transformers; if it is divided, every process must call it.
        pieces: row -> the others, none of which is such a row itself; without any, the row stays.
    """
    for weight in _weights(model) if pieces else []:
        all_rows = whole(weight)
        for row, others in pieces.items():
            if others:
                set_row_(weight, row, all_rows[list(others)].float().mean(dim=0).to(weight.dtype))


def _weights(model: Any) -> list[torch.Tensor]:
    """Of embedding and head; one where they are tied."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return list({id(layer.weight): layer.weight for layer in layers if layer is not None}.values())
