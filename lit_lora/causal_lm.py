"""Run a transformers causal language model on a batch: decoder first, head and loss at supervised positions only.

Three shortcuts are taken where they are exact. *Packing*: examples lie one after another without padding, with
attention confined to each (``attention.py``). *Shared prefix*: what all examples of a packed batch begin with (a system
prompt) is computed once (``shared_prefix.py``). *Direct head*: the loss is computed from hidden states and the head's
weight in chunks (``losses.py``). Whether they are exact for a given model is not looked up by its name but tried on it:
``choose_path`` compares them with the model's own forward on two short examples before training starts. Where one
differs, batches are padded, or the model computes its own logits at the supervised positions.

Shapes: B batch, T tokens, L padded length, N examples, S supervised positions, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_lora.adapters.int8_rows import Int8Head
from lit_lora.attention import SeqLens, no_mask, use_packed_attention
from lit_lora.losses import IGNORE_INDEX, LinearCrossEntropyOutput, linear_cross_entropy_with_accuracy
from lit_lora.shared_prefix import share_prefix, why_no_shared_prefix

Batch = dict[str, Any]

_TOLERANCE = 2e-5  # relative to the largest logit, float32; looser in half precision
_HEAD_CHANGES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Path:
    """How batches of a model are run."""

    packed: bool
    """Examples one after another, without padding; else padded to the longest."""
    direct_head: bool
    """Loss from hidden states and the head's weight; else from the model's own logits."""
    reason: str
    """Why a shortcut is not taken; empty where all are."""
    shared_prefix: bool = False
    """What all examples of a packed batch begin with is computed once."""

    def __str__(self) -> str:
        rows = "packed without padding" if self.packed else "padded"
        rows += ", shared beginnings computed once" if self.shared_prefix else ""
        head = "loss from hidden states, in chunks" if self.direct_head else "loss from the model's logits"
        return f"{rows}; {head}" + (f" ({self.reason})" if self.reason else "")


def choose_path(
    model: PreTrainedModel, *, packing: bool = True, direct_head: bool = True, shared_prefix: bool = True
) -> Path:
    """Find out which shortcuts are exact for ``model``, and select packed attention where packing is.

    Runs the model five times on twelve tokens.

    Args:
        model: a causal language model, adapters injected or not, on its final device.
        packing: False to pad without trying.
        direct_head: False to use the model's logits without trying.
        shared_prefix: False to compute every example whole.
    """
    reasons = []
    training = model.training
    model.eval()
    try:
        if direct_head and (reason := _why_not_direct_head(model)):
            direct_head = False
            reasons.append(reason)
        if packing and (reason := _why_not_packed(model)):
            packing = False
            reasons.append(reason)
        shared_prefix = shared_prefix and packing
        if shared_prefix and (reason := _why_not_shared_prefix(model)):
            shared_prefix = False
            reasons.append(f"no shared beginnings: {reason}")
    finally:
        model.train(training)
    return Path(packing, direct_head, "; ".join(reasons), shared_prefix)


def language_model_loss(
    model: PreTrainedModel, batch: Batch, path: Path, *, accuracy: bool = False
) -> LinearCrossEntropyOutput:
    """Sum of the negative log-likelihoods of a batch's target tokens.

    Args:
        model: the causal language model.
        batch: as the collators of ``lit_lora.data`` make it, or ``input_ids``, ``attention_mask`` and ``labels`` as
            transformers' collators make it.
        path: from :func:`choose_path`.
        accuracy: also count the tokens that were predicted right.
    """
    batch = with_targets(batch)
    if not path.packed and "cu_seq_lens" in batch:
        batch = unpack(batch)
    if path.shared_prefix and "cu_seq_lens" in batch:
        batch = share_prefix({**batch, "seq_lens": _seq_lens(batch)})
    positions_S, targets_S = batch["target_positions"], batch["target_ids"]
    if path.direct_head:
        hidden_TD = _hidden_states(model, batch).flatten(0, 1)
        head = model.get_output_embeddings()
        weight = head if isinstance(head, Int8Head) else head.weight
        return linear_cross_entropy_with_accuracy(hidden_TD[positions_S], weight, targets_S, accuracy=accuracy)
    logits_SV = _logits(model, batch, positions_S).float()
    nll_sum = F.cross_entropy(logits_SV, targets_S, reduction="sum")
    num_correct = (logits_SV.argmax(-1) == targets_S).sum() if accuracy else None
    return LinearCrossEntropyOutput(nll_sum, num_correct)


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
    starts = [0]
    for length in seq_lens:
        starts.append(starts[-1] + length)
    row_of_T = torch.repeat_interleave(
        torch.arange(len(seq_lens), device=ids_T.device), torch.tensor(seq_lens, device=ids_T.device)
    )
    flat_of_T = row_of_T * longest + batch["position_ids"].squeeze(0)
    input_ids_NL = ids_T.new_zeros(len(seq_lens) * longest).scatter(0, flat_of_T, ids_T).view(len(seq_lens), longest)
    mask_NL = torch.zeros_like(input_ids_NL).flatten().scatter(0, flat_of_T, 1).view_as(input_ids_NL)
    padded = {key: value for key, value in batch.items() if key not in ("position_ids", "cu_seq_lens", "seq_lens")}
    return {
        **padded,
        "input_ids": input_ids_NL,
        "attention_mask": mask_NL,
        "target_positions": flat_of_T[batch["target_positions"]],
    }


def _seq_lens(batch: Batch) -> list[int]:
    if "seq_lens" in batch:
        return batch["seq_lens"]
    return batch["cu_seq_lens"].diff().tolist()  # syncs on CUDA; our collator gives seq_lens


def _model_inputs(batch: Batch) -> Batch:
    if "cu_seq_lens" not in batch:
        inputs: Batch = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    else:
        inputs = {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "attention_mask": no_mask(batch["input_ids"].device),
            "cu_seq_lens_q": batch["cu_seq_lens"],
            "seq_lens": SeqLens(_seq_lens(batch), batch.get("shared_prefix", 0)),
        }
    return {**inputs, "use_cache": False}


def _hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model.get_decoder()(**_model_inputs(batch)).last_hidden_state


def _logits(model: PreTrainedModel, batch: Batch, positions_S: Tensor) -> Tensor:
    inputs = _model_inputs(batch)
    if batch["input_ids"].shape[0] > 1:
        return model(**inputs).logits.flatten(0, 1)[positions_S]
    return model(**inputs, logits_to_keep=positions_S).logits.squeeze(0)


def _probe(model: PreTrainedModel, length: int, start: int) -> Tensor:
    device: Any = model.get_input_embeddings().weight.device
    return (torch.arange(start, start + length, device=device) * 7 % model.config.get_text_config().vocab_size)[None]


def _differ(got: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE if expected.dtype == torch.float32 else 0.05
    limit = tolerance * expected.float().abs().max().clamp(min=1e-6)
    return got.shape != expected.shape or not bool((got.float() - expected.float()).abs().max() <= limit)


@torch.no_grad()
def _why_not_direct_head(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Int8Head):
        return f"the output head is a {type(head).__name__}"
    if isinstance(head, nn.Linear) and head.bias is not None:
        return "the output head has a bias"
    config = model.config.get_text_config()
    if changed := [name for name in _HEAD_CHANGES_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]:
        return f"the model changes its logits ({', '.join(changed)})"
    try:
        decoder = model.get_decoder()
        ids = _probe(model, 5, 3)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
    except (AttributeError, TypeError, NotImplementedError) as error:
        return f"the decoder cannot be run apart from the head ({error})"
    if decoder is model or _differ(head(hidden), model(input_ids=ids, use_cache=False).logits):
        return "the model's logits are not its head applied to the decoder's output"
    return ""


@torch.no_grad()
def _why_not_packed(model: PreTrainedModel) -> str:
    examples = [_probe(model, 5, 3), _probe(model, 7, 11)]
    expected = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in examples], dim=1)
    implementation = model.config._attn_implementation
    try:
        use_packed_attention(model)
        got = model(**_model_inputs(_packed(examples))).logits
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = f"packing is not possible with this model ({str(error).splitlines()[0]})"
    else:
        if not _differ(got, expected):
            return ""
        reason = "packing would change this model's outputs"
    model.set_attn_implementation(implementation)
    return reason


@torch.no_grad()
def _why_not_shared_prefix(model: PreTrainedModel) -> str:
    if reason := why_no_shared_prefix(model):
        return reason
    first, second = _probe(model, 5, 3), _probe(model, 7, 11)
    second[:, :3] = first[:, :3]
    batch = _packed([first, second])
    batch["target_positions"] = torch.tensor([3, 4, 8, 9, 10, 11])
    expected = model(**_model_inputs(batch)).logits[:, batch["target_positions"]]
    batch = share_prefix(batch, min_saved=3)
    got = model(**_model_inputs(batch)).logits[:, batch["target_positions"]]
    return "sharing them would change this model's outputs" if _differ(got, expected) else ""


def _packed(examples: Sequence[Tensor]) -> Batch:
    device, lengths = examples[0].device, [ids.shape[1] for ids in examples]
    return {
        "input_ids": torch.cat([*examples], dim=1),
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "cu_seq_lens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        "seq_lens": lengths,
    }
