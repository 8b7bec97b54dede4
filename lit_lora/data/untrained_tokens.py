"""Tokens that a chat template writes and the base was never trained on: their embeddings are all zero, or all the same.

A base model's vocabulary has places in reserve. A template that uses them asks the adapter to tell apart what looks the
same to the model, and to end answers with a token that it cannot see: the loss falls, and generation does not stop.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.data.chats.chat_template import ChatTemplate
from lit_lora.data.chats.template_needs import TemplateNeeds
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.wording import advice


def untrained_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens of the chat template that the base was never trained on, and the adapter does not train.

    Looks up a few rows of the embedding; an embedding that trains, or is divided among ranks, is not looked at.

    Args:
        model: with its adapter.
        tokenizer: with the template.
    """
    embedding = model.get_input_embeddings()
    parameters = list(embedding.parameters())
    if any(p.requires_grad or isinstance(p, DTensor) or p.is_meta for p in parameters) or not parameters:
        return []
    added = {token_id: str(token.content) for token_id, token in tokenizer.added_tokens_decoder.items()}
    ids = sorted(token_id for token_id in added if token_id < model.config.get_text_config().vocab_size)
    written = _written(tokenizer, added) & set(ids)
    if not written:
        return []
    with torch.no_grad():
        rows = embedding(torch.tensor(ids, device=parameters[0].device))
    _, which, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    untrained = ((counts[which] > 1) | (rows == 0).all(dim=1)).tolist()
    return [added[token_id] for token_id, found in zip(ids, untrained, strict=True) if found and token_id in written]


def warn_of_untrained_tokens(trainer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so where the model that a Trainer trains has some.

    Args:
        trainer: None for none.
        tokenizer: with the template.
    """
    model = getattr(None if trainer is None else trainer.lightning_module, "model", None)
    if isinstance(model, PreTrainedModel) and (found := untrained_tokens(model, tokenizer)):
        fix = advice("add the embedding to {}", "model.lora.modules_to_save", otherwise="train the embedding too")
        warnings.warn(
            f"the base was never trained on {', '.join(found)}, which the chat template writes: their embeddings are "
            "zero or equal to those of others, so that the model cannot tell them apart. Take a base that knows the "
            f"template (an instruct model), or a tokenizer with another chat_template, or {fix}",
            UserWarning,
            stacklevel=2,
        )


def _written(tokenizer: PreTrainedTokenizerBase, added: dict[int, str]) -> set[int]:
    """Added tokens that the template writes in a short conversation."""
    template = ChatTemplate(tokenizer)
    needs = TemplateNeeds(template)
    turns = [{"role": role, "content": needs.content("x")} for role in ("user", "assistant")]
    text = needs.rendered(turns) or ""
    return {token_id for token_id, token in added.items() if token in text} | {
        token_id for token_id in turn_end(tokenizer).ids if token_id in added
    }
