"""Which shortcuts are exact for a model: tried on it before a run, not looked up by its name.

The model runs a few short examples its general way, padded and with its own logits, and then each shorter way that its
structure allows. Compared are the logits at the target tokens in evaluation mode, and in training mode, with dropout
left out, the loss and its gradients for the adapters and for the embedding of every token. Where they differ, or where
a shortcut raises, it is not taken, and the path says why. Our own errors are not hidden that way: what was raised by
this package is raised again, unless it is ``CannotPack``.

A few tokens do not show everything. Windows and chunks of any length: ``attention_calls.py``. Soft caps, and scales
that are one in a short row: the logits must be the very tensor that the head returned, and no position may be counted
along the row (``trial_run.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from lit_lora.base.base_weight import rounds_products
from lit_lora.base.repeated_layers import repeated_layers
from lit_lora.base.shards import agreed, recover_
from lit_lora.base.whose_error import described, raised_here
from lit_lora.language_model.attention import CannotPack
from lit_lora.language_model.attention_calls import packable_up_to, record_calls
from lit_lora.language_model.forward import ForwardPath
from lit_lora.language_model.trial_run import (
    SHARED,
    GeneralRun,
    LossRun,
    TrialBatch,
    layout_logits,
    logit_difference,
    loss_difference,
    named_ids,
    placeholder_trial,
    quietly,
    run_general,
    run_loss,
    set_mode,
    trial_batch,
)

T = TypeVar("T")

_LENGTHS = (10, 7)
"""Tokens of the examples, at least: together a number that little else has."""
_VISIBLE = 64
"""Sliding windows of so many tokens at most are seen at work: an example is made longer than them."""


class _Tolerance(NamedTuple):
    """Relative differences that rounding makes, and no shortcut that is wrong."""

    logits: float
    loss: float
    gradients: float


_EXACT = {torch.float32: _Tolerance(1e-4, 1e-5, 1e-3), torch.float64: _Tolerance(1e-8, 1e-9, 1e-7)}
_ROUGH = _Tolerance(0.25, 0.02, 0.5)
"""In half precision a model of 30 layers differs by 0.06 from itself, when its rows are laid out in another way."""


def choose_path(
    model: nn.Module, *, packing: bool = True, direct_head: bool = True, shared_prefix: bool = True
) -> ForwardPath:
    """Find out which shortcuts are exact for ``model``.

    Runs it six times on about twenty tokens, twice of these with a backward pass if gradients are enabled; more often
    where a shortcut turns out not to be exact.

    Args:
        model: a causal language model, adapters injected or not, on its final device.
        packing: False to pad without trying.
        direct_head: False to use the model's logits without trying.
        shared_prefix: False to compute every example whole.

    Raises:
        ValueError: if its own forward pass shows that it cannot be trained on next tokens.
    """
    check_causal_lm(model)
    assert isinstance(model, PreTrainedModel)
    reasons = []
    with quietly(model):
        set_mode(model, training=False)
        limits = _Limits(0, None)
        if packing:
            found, reason = _attempt(_packing_limits, model)
            limits = found or limits
            if reason:
                packing = False
                reasons.append(f"not packed: {reason}")
        batch, general = _general_run(model, limits)
        tolerance = _tolerance(model, general)
        if direct_head and general.why_not_direct:
            direct_head = False
            reasons.append(general.why_not_direct)
        expected = _expected_loss(model, batch)
        set_mode(model, training=False)
        layouts = ["padded"]
        for layout in ("packed", "shared") if shared_prefix and packing else ("packed",) if packing else ():
            reason = _why_not_shared(batch, expected) if layout == "shared" else ""
            reason = agreed(model, reason or _why_other_logits(model, layout, batch, general, tolerance))
            if reason:
                reasons.append(f"{_WITHOUT[layout]}: {reason}")
                break
            layouts.insert(0, layout)
        layout, direct_head = _confirmed(model, layouts, direct_head, batch, expected, tolerance, reasons)
    return ForwardPath(
        layout != "padded",
        direct_head,
        "; ".join(reasons),
        layout == "shared",
        limits.packed_up_to if layout != "padded" else None,
        _other_loss(general, batch, tolerance),
    )


def likely_path(model: nn.Module, *, packing: bool = True, direct_head: bool = True) -> ForwardPath:
    """What ``choose_path`` would find as far as the structure of a model tells, for one whose tensors have no values.

    Packing is taken to be exact where every layer computes its attention as packed attention does.

    Raises:
        ValueError: for a model that is no causal language model of transformers.
    """
    check_causal_lm(model)
    assert isinstance(model, PreTrainedModel)
    reasons = []
    batch = placeholder_trial(model, _LENGTHS)
    with quietly(model):
        set_mode(model, training=False)
        why_not_direct = run_general(model, batch, labelled=False).why_not_direct if direct_head else ""
        if why_not_direct:
            reasons.append(why_not_direct)
        if packing:
            _, reason = _attempt(_check_structure, model, batch)
            if reason:
                packing = False
                reasons.append(f"{_WITHOUT['packed']}: {reason}")
    return ForwardPath(packing, direct_head and not why_not_direct, "; ".join(reasons))


def _check_structure(model: PreTrainedModel, batch: TrialBatch) -> None:
    calls = record_calls(model, batch.layouts["padded"]["input_ids"][:1])
    with _disable_current_modes():  # rules are functions of indices, which have values
        packable_up_to(calls, torch.device("cpu"))
    if len(calls) < len(repeated_layers(model)):
        raise CannotPack("not every layer attends, and the others may mix examples")
    if layout_logits(model, batch, "packed").counted:
        raise CannotPack(_COUNTED)


def check_causal_lm(model: nn.Module) -> None:
    """Look for what the loss of next tokens needs.

    Raises:
        ValueError: for a model with an encoder, or without an output head, or of another library.
    """
    kind = "no language model of transformers"
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        if not model.config.is_encoder_decoder:
            return
        kind = "an encoder-decoder"
    raise ValueError(
        f"{type(model).__name__} is {kind}, and the loss of LoRALightningModule is that of the next token: override "
        "compute_loss for this model, as load_base"
    )


_COUNTED = "it counts positions along the row"
_WITHOUT = {"packed": "not packed", "shared": "no shared beginnings"}


class _Limits(NamedTuple):
    """What rows of any length show."""

    longest_visible_window: int
    packed_up_to: int | None


@torch.no_grad()
def _packing_limits(model: PreTrainedModel) -> _Limits:
    ids = trial_batch(model, _LENGTHS, special=False).layouts["padded"]["input_ids"][:1]
    calls = record_calls(model, ids)
    packed_up_to = packable_up_to(calls, ids.device)
    if packed_up_to is not None and packed_up_to < sum(_LENGTHS):
        raise CannotPack(f"a window or chunk of its attention, of {packed_up_to} tokens, is told by the mask alone")
    windows = [call.window for call in calls if call.window is not None and call.window <= _VISIBLE]
    return _Limits(max(windows, default=0), packed_up_to)


def _general_run(model: PreTrainedModel, limits: _Limits) -> tuple[TrialBatch, GeneralRun]:
    """The model's own way, with whatever of special tokens and labels it takes.

    Raises:
        ValueError: if it takes nothing, gives no numbers, or is not causal.
    """
    longest = max(_LENGTHS[0], SHARED + len(named_ids(model)), limits.longest_visible_window + SHARED)
    longest = min(longest, limits.packed_up_to or longest)
    name = type(model).__name__
    for special, labelled in ((True, True), (True, False), (False, True), (False, False)):
        batch = trial_batch(model, (longest, *_LENGTHS[1:]), special=special)
        general, reason = _attempt(run_general, model, batch, labelled=labelled)
        if general is not None:
            break
    else:
        raise ValueError(
            f"{name} does not run on a batch of token ids and an attention mask alone ({reason}): for a model that "
            "needs other inputs, override compute_loss of LoRALightningModule"
        )
    if general.logits_NLV.isnan().any():
        raise ValueError(f"the logits of {name} on a few tokens are not numbers (NaN): are its weights whole?")
    if _sees_later_tokens(model, batch, general):
        raise ValueError(
            f"{name} is not causal: its prediction at a token depends on the tokens after it, so training on next "
            "tokens would teach it to copy. Load a causal model (for BERT and its kin, is_decoder: true in config.json)"
        )
    return batch, general


def _sees_later_tokens(model: PreTrainedModel, batch: TrialBatch, general: GeneralRun) -> bool:
    """Whether the logits at what both examples begin with depend on how these go on.

    Where products are rough, by more than they do on the place of the examples in the batch: what a model of BERT's
    kind gives at a token that it sees may depend little on later ones, and less than on rounding it must not.
    """
    here, there = general.logits_NLV[:, :SHARED]
    difference, tolerance = logit_difference(there, here), _tolerance(model, general)
    if tolerance is _ROUGH and _EXACT[torch.float32].logits < difference <= tolerance.logits:
        swapped, _ = _attempt(run_general, model, batch.swapped, labelled=False)
        return swapped is not None and difference > 4 * logit_difference(swapped.logits_NLV[1, :SHARED], here)
    return not difference <= tolerance.logits


def _why_other_logits(
    model: PreTrainedModel, layout: str, batch: TrialBatch, general: GeneralRun, tolerance: _Tolerance
) -> str:
    found, reason = _attempt(layout_logits, model, batch, layout)
    if found is None:
        return reason
    if layout == "packed" and found.counted:
        return _COUNTED
    difference = logit_difference(
        found.logits_RV[batch.rows(layout)], general.logits_NLV.flatten(0, 1)[batch.rows("padded")]
    )
    return "" if difference <= tolerance.logits else f"it would change the model's outputs (by {difference:.1g})"


def _expected_loss(model: PreTrainedModel, batch: TrialBatch) -> LossRun:
    """Loss and gradients of the general way, in training mode if gradients are enabled.

    Raises:
        ValueError: if the model does not run so.
    """
    set_mode(model, training=torch.is_grad_enabled())
    expected, reason = _attempt(run_loss, model, batch, "padded", direct_head=False)
    if expected is not None and expected.random:  # noise of its own: two runs would differ however they are laid out
        set_mode(model, training=False)
        in_evaluation, reason = _attempt(run_loss, model, batch, "padded", direct_head=False)
        expected = in_evaluation and in_evaluation._replace(random=True)
    if expected is None:
        raise ValueError(f"{type(model).__name__} does not run in training mode on a batch of text ({reason})")
    return expected


def _why_not_shared(batch: TrialBatch, expected: LossRun) -> str:
    if "shared_prefix" not in batch.layouts["shared"]:
        return "on a CPU only"
    if expected.random:
        return "each example has noise of its own"
    return "each example has dropout of its own" if expected.dropout else ""


def _confirmed(
    model: PreTrainedModel,
    layouts: list[str],
    direct_head: bool,
    batch: TrialBatch,
    expected: LossRun,
    tolerance: _Tolerance,
    reasons: list[str],
) -> tuple[str, bool]:
    """The first layout, and whether the direct head goes with it, whose loss and gradients are the general way's."""
    set_mode(model, training=torch.is_grad_enabled() and not expected.random)
    for layout in layouts:
        for direct in (True, False) if direct_head else (False,):
            if layout == "padded" and not direct:
                continue
            got, reason = _attempt(run_loss, model, batch, layout, direct_head=direct)
            if got is not None:
                differences = loss_difference(got, layout, expected, batch)
                in_loss, *in_gradients = differences.values()
                if not (in_loss <= tolerance.loss and all(value <= tolerance.gradients for value in in_gradients)):
                    named = ", ".join(f"{name} by {value:.1g}" for name, value in differences.items())
                    reason = f"it would change {named}"
            reason = agreed(model, reason)
            if not reason:
                return layout, direct
            reasons.append(f"not {layout}{' with the loss from hidden states' if direct else ''}: {reason}")
    return "padded", False


def _other_loss(general: GeneralRun, batch: TrialBatch, tolerance: _Tolerance) -> str:
    padded = batch.layouts["padded"]
    logits_SV = general.logits_NLV.flatten(0, 1)[padded["target_positions"]].float()
    ours = float(torch.nn.functional.cross_entropy(logits_SV, padded["target_ids"]))
    if general.own_loss is None or abs(general.own_loss - ours) <= tolerance.loss * abs(ours):
        return ""
    return (
        "trained on the mean over target tokens alone; the model's own loss is another, "
        f"{general.own_loss:.4g} in place of {ours:.4g} on a few tokens"
    )


def _tolerance(model: PreTrainedModel, general: GeneralRun) -> _Tolerance:
    rough = torch.get_float32_matmul_precision() != "highest" or any(map(rounds_products, model.modules()))
    return _ROUGH if rough else _EXACT.get(general.logits_NLV.dtype, _ROUGH)


def _attempt(function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T | None, str]:
    """The result, or why there is none: whatever the model raises. What this package raises are errors of its own."""
    try:
        return function(*args, **kwargs), ""
    except CannotPack as error:
        return None, str(error)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if raised_here(error):
            raise
        for argument in args:
            if isinstance(argument, nn.Module):
                recover_(argument)
        return None, described(error)
