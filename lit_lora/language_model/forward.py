"""Run a transformers causal language model on a batch: decoder first, head and loss at supervised positions only.

Three shortcuts are taken where they are exact. *Packing*: examples lie one after another without padding, with
attention confined to each (``attention.py``). *Shared prefix*: what all examples of a packed batch begin with (a system
prompt) is computed once (``shared_prefix.py``). *Direct head*: the loss is computed from hidden states and the head's
weight in chunks (``kernels/linear_cross_entropy.py``). Whether they are exact for a given model is found by trial
(``trial.py``); without them batches are padded, and the model computes its own logits at the supervised positions.

Shapes: B batch, T tokens, L padded length, N examples, S supervised positions, D hidden, V vocab.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_lora.base.int8_rows import Int8Head
from lit_lora.base.shards import in_one_pass
from lit_lora.batch import Batch
from lit_lora.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    LinearCrossEntropyOutput,
    linear_cross_entropy_with_accuracy,
)
from lit_lora.language_model.attention import SeqLens, no_mask, packed_attention
from lit_lora.language_model.shared_prefix import share_prefix


@dataclass(frozen=True)
class ForwardPath:
    """How batches of a model are run."""

    packed: bool
    """Examples one after another, without padding; else padded to the longest."""
    direct_head: bool
    """Loss from hidden states and the head's weight; else from the model's own logits."""
    reason: str
    """Why a shortcut is not taken; empty where all are."""
    shared_prefix: bool = False
    """What all examples of a packed batch begin with is computed once."""
    packed_up_to: int | None = None
    """Tokens of the longest example that is packed; a batch with a longer one is padded. None for no such limit."""
    other_loss: str = ""
    """How the model's own loss differs from the one that is trained on; empty where it does not."""

    def __str__(self) -> str:
        rows = "packed without padding" if self.packed else "padded"
        rows += f" up to {self.packed_up_to} tokens an example" if self.packed_up_to else ""
        rows += ", shared beginnings computed once" if self.shared_prefix else ""
        head = "loss from hidden states, in chunks" if self.direct_head else "loss from the model's logits"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{rows}; {head}{reason}" + (f"; {self.other_loss}" if self.other_loss else "")


def language_model_loss(
    model: PreTrainedModel, batch: Batch, path: ForwardPath, *, accuracy: bool = False
) -> LinearCrossEntropyOutput:
    """Sum of the negative log-likelihoods of a batch's target tokens, each times its weight where they have weights.

    Args:
        model: the causal language model.
        batch: as the collators of ``lit_lora.data`` make it; one of transformers' collators needs :func:`with_targets`.
        path: from :func:`lit_lora.language_model.trial.choose_path`.
        accuracy: also count the tokens that were predicted right.
    """
    batch = laid_out(batch, path)
    if path.direct_head:
        return in_one_pass(model, lambda: _direct_loss(model, batch, accuracy=accuracy))
    logits_SV = target_logits(model, batch)
    targets_S, weights_S = batch["target_ids"], batch.get("target_weights")
    if weights_S is None:
        nll_sum = F.cross_entropy(logits_SV, targets_S, reduction="sum")
    else:
        nll_sum = (F.cross_entropy(logits_SV, targets_S, reduction="none") * weights_S).sum()
    num_correct = (logits_SV.argmax(-1) == targets_S).sum() if accuracy else None
    return LinearCrossEntropyOutput(nll_sum, num_correct)


def _direct_loss(model: PreTrainedModel, batch: Batch, *, accuracy: bool) -> LinearCrossEntropyOutput:
    hidden_SD, targets_S, weights_S = target_hidden(model, batch), batch["target_ids"], batch.get("target_weights")
    head = model.get_output_embeddings()
    weight = head if isinstance(head, Int8Head) else head.weight
    return linear_cross_entropy_with_accuracy(hidden_SD, weight, targets_S, accuracy=accuracy, weights=weights_S)


def target_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The decoder's output at the target positions of a batch that is laid out, ``(S, D)``; see ``in_one_pass``."""
    with _attention_of(model, batch):
        hidden_TD = model.get_decoder()(**_model_inputs(batch)).last_hidden_state.flatten(0, 1)
    return hidden_TD[batch["target_positions"]]


def target_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's own logits at the target positions of a batch that is laid out, ``(S, V)``, float32."""
    positions_S = batch["target_positions"]
    with _attention_of(model, batch):
        if batch["input_ids"].shape[0] > 1 or not _keeps_logits(type(model).forward):
            return model(**_model_inputs(batch)).logits.flatten(0, 1)[positions_S].float()
        return model(**_model_inputs(batch), logits_to_keep=positions_S).logits.squeeze(0).float()


@cache
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    """Whether a model computes logits at given positions alone."""
    return "logits_to_keep" in inspect.signature(forward).parameters


def laid_out(batch: Batch, path: ForwardPath) -> Batch:
    """``batch`` in the layout that the path asks for: padded, packed, or with its beginning shared."""
    if "cu_seq_lens" not in batch or "longest" in batch:
        return batch
    seq_lens = _seq_lens(batch)
    if not path.packed or (path.packed_up_to is not None and max(seq_lens) > path.packed_up_to):
        return unpack(batch)
    return share_prefix({**batch, "seq_lens": seq_lens}) if path.shared_prefix else batch


def placeholder_batch(
    lengths: Sequence[int], *, packed: bool, device: torch.device | str, supervised: float = 1.0
) -> Batch:
    """A batch of the right sizes without content, to measure or trace a step with.

    Args:
        lengths: tokens of each example.
        packed: one after another, else padded to the longest.
        device: of its tensors.
        supervised: share of the tokens that the loss counts.
    """
    rows, columns = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    num_targets = max(1, int(supervised * sum(length - 1 for length in lengths)))
    integers: dict[str, Any] = {"dtype": torch.int64, "device": device}
    batch: Batch = {
        "input_ids": torch.zeros(rows, columns, **integers),
        "target_positions": torch.zeros(num_targets, **integers),
        "target_ids": torch.zeros(num_targets, **integers),
    }
    if packed:
        batch["position_ids"] = torch.zeros(rows, columns, **integers)
        batch["cu_seq_lens"] = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
        batch["seq_lens"] = list(lengths)
    else:
        batch["attention_mask"] = torch.ones(rows, columns, **integers)
    return batch


def with_targets(batch: Batch) -> Batch:
    """``batch`` with ``target_positions`` and ``target_ids``, derived from ``labels`` where a foreign collator made it.

    Raises:
        ValueError: if there are neither.
    """
    if "target_positions" in batch:
        return batch
    if "labels" not in batch:
        raise ValueError(
            f"a batch needs labels (-100 where unsupervised) or target_positions and target_ids; it has {sorted(batch)}"
        )
    labels_BL = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    positions_S = (labels_BL.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)  # syncs on CUDA; our collators avoid it
    return {**batch, "target_positions": positions_S, "target_ids": labels_BL.flatten()[positions_S]}


def unpack(batch: Batch) -> Batch:
    """A packed batch as a padded one: same examples, same targets."""
    seq_lens = _seq_lens(batch)
    longest = max(seq_lens)
    ids_T = batch["input_ids"].squeeze(0)
    # From what is on the device already: copying the lengths there would wait for it.
    starts_N = batch["cu_seq_lens"][:-1]
    row_of_T = torch.bucketize(torch.arange(len(ids_T), device=ids_T.device), starts_N, right=True) - 1
    flat_of_T = row_of_T * longest + batch["position_ids"].squeeze(0)
    input_ids_NL = ids_T.new_zeros(len(seq_lens) * longest).scatter(0, flat_of_T, ids_T).view(len(seq_lens), longest)
    mask_NL = torch.zeros_like(input_ids_NL).flatten().scatter(0, flat_of_T, 1).view_as(input_ids_NL)
    targets = flat_of_T[batch["target_positions"]]
    padded: Batch = {**batch, "input_ids": input_ids_NL, "attention_mask": mask_NL, "target_positions": targets}
    del padded["position_ids"], padded["cu_seq_lens"]
    padded.pop("seq_lens", None)
    return padded


def _seq_lens(batch: Batch) -> list[int]:
    if "seq_lens" in batch:
        return batch["seq_lens"]
    return batch["cu_seq_lens"].diff().tolist()  # syncs on CUDA; our collator gives seq_lens


def _spoken_lengths(batch: Batch) -> SeqLens:
    if "longest" in batch:
        return SeqLens(None, longest=batch["longest"])
    return SeqLens(_seq_lens(batch), batch.get("shared_prefix", 0))


def _model_inputs(batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any]
    if "cu_seq_lens" not in batch:
        inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "position_ids")}
    else:
        inputs = {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "attention_mask": no_mask(batch["input_ids"].device),
            "cu_seq_lens_q": batch["cu_seq_lens"],
            "seq_lens": _spoken_lengths(batch),
        }
    return {**inputs, "use_cache": False}


def _attention_of(model: PreTrainedModel, batch: Batch) -> AbstractContextManager[None]:
    return packed_attention(model) if "cu_seq_lens" in batch else nullcontext()
