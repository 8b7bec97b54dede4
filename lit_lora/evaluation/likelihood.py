"""How likely a model finds held-out examples: loss and right predictions of their target tokens, example by example.

Shapes: N examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.base.shards import device_of_model
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.chats.tokenize import Encoded, encode_examples
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.data.rows.sources import Problems
from lit_lora.evaluation.answer_metrics import Scored, perplexity, share
from lit_lora.evaluation.held_out import HeldOut
from lit_lora.language_model.generation import check_vocabulary
from lit_lora.language_model.token_scores import token_scores
from lit_lora.language_model.trial import choose_path

LOSS, WEIGHT, CORRECT, TARGETS = range(4)
"""Columns of :func:`token_sums`."""


def token_sums(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, *, batch_size: int
) -> NDArray[np.float64]:
    """Sums over the target tokens of each example, ``(N, 4)``: weighted loss in nats, weight, right ones, all.

    What counts is what counts in validation: answers, or whole texts, as far as ``held_out.max_length`` goes.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        held_out: the examples.
        batch_size: examples at a time.

    Raises:
        ValueError: if no target is left within ``max_length``, the model does not know a token, the chat template
            refuses an example, or the loss is no number.
    """
    tokenized = list(_tokenized(tokenizer, held_out))
    if not tokenized:
        raise ValueError(
            f"none of the {len(held_out.examples.items)} examples has a target token among its first "
            f"{held_out.max_length}"
        )
    check_vocabulary(model, [example.ids.tolist() for example in tokenized])
    device = device_of_model(model)
    path, sums = choose_path(model), np.zeros((len(held_out.examples.items), 4))
    for start in range(0, len(tokenized), batch_size):
        examples = tokenized[start : start + batch_size]
        packed: Any = collate_packed(examples)
        batch: Any = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in packed.items()}
        nll, correct = (column.cpu().double().numpy() for column in token_scores(model, batch, path))
        weights = packed["target_weights"].double().numpy() if "target_weights" in packed else np.ones_like(nll)
        owner = np.repeat([example.example_id for example in examples], [int(e.mask.sum()) for e in examples])
        np.add.at(sums, owner, np.stack([nll * weights, weights, correct, np.ones_like(nll)], axis=1))
    total = sums[:, LOSS].sum()
    if not math.isfinite(total):
        raise ValueError(f"the loss is {total}: base or adapter holds NaN or infinity, or overflows in {model.dtype}")
    return sums


def mean_loss(sums: NDArray[np.float64]) -> float:
    """Mean loss of the target tokens by their weight, in nats; as validation measures it."""
    return float(sums[:, LOSS].sum() / sums[:, WEIGHT].sum())


def token_metrics(sums: NDArray[np.float64]) -> dict[str, Scored]:
    """Name -> score, of what :func:`token_sums` found."""
    return {
        "token_accuracy": Scored(sums[:, [CORRECT, TARGETS]], share),
        "perplexity": Scored(sums[:, [LOSS, WEIGHT]], perplexity, higher_is_better=False, unit=""),
    }


def _tokenized(tokenizer: PreTrainedTokenizerBase, held_out: HeldOut) -> Iterator[TokenizedExample]:
    """Those that have targets; one that is several texts for its template has the number of its example in each."""
    items = held_out.examples.items
    options: dict[str, Any] = {
        "max_length": held_out.max_length,
        "train_on_prompt": held_out.train_on_prompt,
        "train_on_turns": held_out.train_on_turns,
        "reasoning": held_out.reasoning,
    }
    numbered = [example._replace(line=number) for number, example in enumerate(items)]
    problems = Problems("")
    encoded: list[Encoded] = encode_examples(tokenizer, numbered, problems, **options)
    if problems.first:
        refused, source = problems.first[0], held_out.examples.problems.source
        raise ValueError(f"{source}, line {items[refused.line].line}: {refused.message}")
    for example in encoded:
        if any(example.mask):
            weights = None if example.weights is None else np.array(example.weights, np.float32)
            ids, mask = np.array(example.ids, np.int32), np.array(example.mask, np.bool_)
            yield TokenizedExample(example.line, ids, mask, weights)
