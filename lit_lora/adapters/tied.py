"""``ensure_weight_tying``: an embedding and the head that has its weight, trained as one.

Without it a copy that is trained in full is one's own, as in PEFT. Rows that are trained (``trainable_token_indices``)
are tied in any case where the weights are.
"""

from __future__ import annotations

from torch import nn

from lit_lora.adapters.module_names import named_modules
from lit_lora.adapters.task_heads import as_pretrained
from lit_lora.config import LoRAConfig


def tied_pair(model: nn.Module) -> tuple[str, str] | None:
    """Names of the embedding and the head of a transformers model if they share one weight."""
    pretrained = as_pretrained(model)
    if pretrained is None:
        return None
    embedding, head = pretrained.get_input_embeddings(), pretrained.get_output_embeddings()
    if embedding is None or head is None or embedding.weight is not head.weight:
        return None
    names = {id(module): name for name, module in named_modules(model).items()}
    return names[id(embedding)], names[id(head)]


def add_tied(
    model: nn.Module,
    config: LoRAConfig,
    targeted: dict[str, list[str]],
    entries: dict[str, list[str]],
    *,
    from_file: bool,
) -> None:
    """Add the other one where only one of a tied embedding and head is trained.

    Args:
        model: without adapters.
        config: with ``ensure_weight_tying``.
        targeted: layer -> entries of ``target_modules``, to be added to.
        entries: entry of ``modules_to_save`` -> modules, to be added to.
        from_file: whether PEFT may have written it. It starts both with the same adapter, and then trains two.

    Raises:
        ValueError: if it has no effect, or embedding and head are to be adapted.
    """
    pair = tied_pair(model)
    saved = {name for names in entries.values() for name in names}
    if pair is not None and saved & set(pair):
        entries |= {name: [name] for name in pair if name not in saved}
        return
    adapted = [name for name in pair or () if name in targeted]
    if pair is not None and adapted and from_file:
        targeted |= {name: targeted[adapted[0]] for name in pair if name not in targeted}
    elif adapted:
        raise ValueError(
            f"ensure_weight_tying: {adapted[0]} is adapted, and two adapters of one weight are no tie. Train embedding "
            "and head in full (modules_to_save), or rows of them (trainable_token_indices)"
        )
    elif not from_file and not (pair and config.trainable_token_indices):
        reason = "neither is trained in full" if pair else "the model ties no head to its embedding"
        raise ValueError(f"ensure_weight_tying has no effect: {reason}")
