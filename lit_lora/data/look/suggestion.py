"""Which ``max_length`` and which batches suit the lengths of some data."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lit_lora.data.batches.sampler import BatchSettings, plan_batches
from lit_lora.data.look.report_parts import Suggested

_STEP = 64
"""Lengths are whole multiples of this."""
_USUAL_BATCH = 4
"""Examples of a micro-batch."""
_WORTH_KEEPING = 1.5
"""Up to this ratio of the longest to the 99th percentile nothing is cut; of batches to their mean, they are even."""


def suggest(lengths: NDArray[np.int64], *, context: int | None) -> tuple[Suggested, ...]:
    """Settings that cut little, and whose batches are of even size.

    Args:
        lengths: tokens of each example, ``(N,)``, before anything is cut.
        context: the longest input that the model takes, in tokens, if it says.
    """
    longest = int(lengths.max())
    nearly_all = int(np.quantile(lengths, 0.99, method="higher"))
    wanted = _rounded(longest if longest <= _WORTH_KEEPING * nearly_all else nearly_all)
    max_length = wanted if context is None else min(wanted, context)
    num_cut = int((lengths > max_length).sum())
    if not num_cut:
        reason = f"nothing is cut: the longest example has {longest:,} tokens"
    else:
        reason = f"cuts {num_cut:,} of {len(lengths):,} examples, the longest of {longest:,} tokens"
    if max_length < wanted:
        reason += "; the model takes no more"
    kept = np.minimum(lengths, max_length)
    return Suggested("max_length", max_length, reason), *_batches(kept, max_length)


def _batches(lengths: NDArray[np.int64], max_length: int) -> tuple[Suggested, ...]:
    padded = plan_batches(lengths, BatchSettings(batch_size=_USUAL_BATCH, padded=True))
    total = sum(len(batch) * int(lengths[batch].max()) for batch in padded)
    packing = Suggested("packing", True, f"padded, {1 - int(lengths.sum()) / total:.0%} of a batch would be padding")
    usual = float(lengths.mean()) * _USUAL_BATCH
    at_most = _USUAL_BATCH * int(lengths.max())
    if at_most <= _WORTH_KEEPING * usual:
        return Suggested("batch_size", _USUAL_BATCH, f"of about {usual:,.0f} tokens, {at_most:,} at most"), packing
    most = max(max_length, _rounded(usual))
    reason = f"about {most / lengths.mean():.1f} examples; {_USUAL_BATCH} of them could have {at_most:,} tokens"
    return Suggested("max_tokens_per_batch", most, reason), packing


def _rounded(length: float) -> int:
    return max(_STEP, -int(-length // _STEP) * _STEP)
