"""An adapter whose tokens go beyond the vocabulary of its base: the base gets rows for them when it is read.

The adapter holds these rows: as rows that are trained (``trainable_token_indices``), in a copy of the embedding that
was trained in full, or, as PEFT writes it after ``resize_token_embeddings``, in a copy of the frozen embedding. The
rows of the last are read as rows that are trained, so that they are written again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lit_lora.adapters.injection_plan import InjectionPlan
from lit_lora.adapters.matching import saved_as_peft
from lit_lora.adapters.module_names import named_modules
from lit_lora.adapters.task_heads import as_pretrained
from lit_lora.adapters.trainable_tokens import DELTA
from lit_lora.base.vocabulary import grow_vocabulary, num_rows
from lit_lora.config import LoRAConfig
from lit_lora.interchange.peft_folder import StoredTensor

_MOST_ADDED = 1 << 16
"""Rows that the numbers in a file can ask for; there are that many new tokens in no vocabulary."""


@contextmanager
def grown_vocabulary(
    model: nn.Module, config: LoRAConfig, header: Iterable[StoredTensor], *, may_grow: bool = True
) -> Iterator[range]:
    """The rows that the base is given for the tokens of an adapter; taken back if what follows fails.

    Raises:
        ValueError: if the base cannot have them.
    """
    pretrained = as_pretrained(model)
    embedding = None if pretrained is None else pretrained.get_input_embeddings()
    if pretrained is None or not isinstance(embedding, nn.Embedding):
        yield range(0)
        return
    name = next(name for name, module in named_modules(model).items() if module is embedding)
    before = num_rows(pretrained)
    stored = {tensor.name: tensor.shape[0] for tensor in header if tensor.shape}
    rows = max(stored.get(f"{name}.weight", 0), stored.get(f"{name}.base_layer.weight", 0))
    trained = [i for ids in config.rows_to_train(name).values() for i in ids]
    rows = max(rows, before, *(i + 1 for i in trained))
    if rows > before + _MOST_ADDED:
        raise ValueError(f"the adapter has tokens up to {rows - 1}, the base model's vocabulary ends at {before - 1}")
    if rows > before and not may_grow:
        raise ValueError(
            f"the adapter has tokens up to {rows - 1}, the base model's vocabulary ends at {before - 1}, and other "
            "adapters are around its layers: load this one first"
        )
    grow_vocabulary(pretrained, rows)
    try:
        yield range(before, rows)
    except BaseException:
        if rows > before:
            pretrained.resize_token_embeddings(before, mean_resizing=False)
        raise


def with_added_rows(model: Any, config: LoRAConfig, header: Iterable[StoredTensor], added: range) -> LoRAConfig:
    """The configuration, with rows for tokens of which the file holds the whole embedding or head."""
    if not added:
        return config
    stored, modules = {tensor.name for tensor in header}, named_modules(model)
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in modules.items() if any(module is layer for layer in layers)]
    in_full = {name for found in saved_as_peft(names, config.modules_to_save or []).values() for name in found}
    rows = dict(config.rows_to_train(names[0]))
    for name in names:
        trained = any(name == entry or name.endswith(f".{entry}") for entry in rows)
        if f"{name}.weight" in stored and name not in in_full and not trained:
            rows[name] = list(added)
    return replace(config, trainable_token_indices=rows) if rows else config


def rows_in_whole_layers(plan: InjectionPlan, stored: Collection[str]) -> dict[str, tuple[str, list[int]]]:
    """Rows that are planned and lie in a whole embedding or head of the file -> what that is called, and where there.

    Args:
        plan: of the adapter.
        stored: names of tensors.
    """
    return {
        f"{name}.{DELTA}": (f"{name}.weight", ids)
        for name, ids in plan.tokens.items()
        if f"{name}.{DELTA}" not in stored and f"{name}.weight" in stored
    }
