"""The tokens that a run adds, held by its base: rows for them in embedding and head, which are trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from lit_lora.adapters.module_names import named_modules
from lit_lora.adapters.task_heads import as_pretrained
from lit_lora.base.vocabulary import fill_rows, grow_vocabulary
from lit_lora.config import LoRAConfig


@runtime_checkable
class AddsTokens(Protocol):
    """A data module that may add tokens to its tokenizer."""

    @property
    def new_tokens(self) -> Any:
        """``NewTokens``."""
        ...

    @property
    def tokenizer(self) -> Any:
        """With the tokens."""
        ...


def rows_needed(lora: LoRAConfig, data: Any) -> int:
    """Rows of a vocabulary with the tokens that are trained and those that ``data`` adds; 0 where there are none."""
    return max(lora.vocabulary_rows, *(1 + i for i in _added(data)), 0)


def _added(data: Any) -> dict[int, Any]:
    return data.tokenizer and data.new_tokens.pieces if isinstance(data, AddsTokens) else {}


def hold_new_tokens(model: Any, lora: LoRAConfig, data: Any) -> LoRAConfig:
    """Make room in a base for the tokens that are trained, those that ``data`` adds among them.

    Args:
        model: without adapters.
        lora: as it was set, or as it was saved with a run, with its new tokens.
        data: the run's; None where there is none.

    Returns:
        ``lora`` with the rows of the new tokens: in the embedding, and in a head of its own.
    """
    adds = _added(data)
    if as_pretrained(model) is None or not (adds or lora.trainable_token_indices):  # images have no tokens at all
        return lora
    modules = named_modules(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    name_of = {id(module): name for name, module in modules.items()}
    rows = lora.rows_to_train(name_of[id(embedding)])
    grow_vocabulary(model, rows_needed(lora, data))
    if not adds:
        return lora
    fill_rows(model, {row: pieces for row, pieces in adds.items() if not any(row in ids for ids in rows.values())})
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = [name for name, module in named_modules(model).items() if any(module is layer for layer in layers)]
    in_full = lora.modules_to_save or []
    for name in names:
        if not any(name == entry or name.endswith(f".{entry}") for entry in in_full):
            rows = {**rows, name: sorted({*rows.get(name, []), *adds})}
    return replace(lora, trainable_token_indices=rows) if rows else lora
