"""The distance between two models' outputs: numbers, and no number where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_lora.evaluation.drift import measure_drift

NAN, INFINITY = float("nan"), float("inf")


def _logits(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 6, generator=generator) for length in (3, 2)]


def test_the_numbers_are_those_of_their_definitions():
    expected, got = _logits(), _logits(1)
    drift = measure_drift(expected, got)
    left, right = torch.cat(expected).double(), torch.cat(got).double()
    assert drift.max_abs == pytest.approx((left - right).abs().max().item(), rel=1e-6)
    assert drift.mean_abs == pytest.approx((left - right).abs().mean().item(), rel=1e-6)
    p = left.softmax(-1)
    assert drift.kl == pytest.approx((p * (p.log() - right.log_softmax(-1))).sum(-1).mean().item())
    assert (drift.top1, drift.num_tokens) == ((left.argmax(-1) == right.argmax(-1)).float().mean().item(), 5)


def _with(logits: list[Tensor], value: float) -> list[Tensor]:
    logits[1][0, 3] = value
    return logits


@pytest.mark.parametrize("where", ["reference", "other", "both"])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_what_is_no_number_is_no_drift(where, value):
    if where == "both" and value == -INFINITY:
        return  # masked in both
    expected = _with(_logits(), value) if where != "other" else _logits()
    got = _with(_logits(), value) if where != "reference" else _logits()
    with pytest.raises(ValueError, match=f"logits of the {'other' if where == 'other' else 'reference'} hold NaN or"):
        measure_drift(expected, got)


def test_a_token_that_both_mask_counts_as_the_same():
    expected, got = _logits(), _logits(1)
    plain = measure_drift([logits[:, 1:] for logits in expected], [logits[:, 1:] for logits in got])
    for logits in (*expected, *got):
        logits[:, 0] = -INFINITY
    masked = measure_drift(expected, got)
    assert masked.max_abs == plain.max_abs
    assert masked.kl == pytest.approx(plain.kl)
    for logits in (*expected, *got):
        logits[1] = -INFINITY
    with pytest.raises(ValueError, match="NaN or infinity"):
        measure_drift(expected, got)


def test_no_difference_is_zero():
    drift = measure_drift(_logits(), _logits())
    assert (drift.max_abs, drift.mean_abs, drift.kl, drift.top1) == (0, 0, pytest.approx(0), 1)
