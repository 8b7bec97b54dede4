"""How sure a score is, and whether two models differ in it, told from the examples that they were both asked.

A score is a function of sums over examples: a mean is the sum of values and their number, corpus BLEU ten counts. So
one pair of procedures does for all of them. *Interval*: Wilson's for a share of right answers, else the percentiles of
resampled examples (the bootstrap). *Test*: a score that is right or wrong for each example is tested by those that
only one of the two has right (the exact sign test, McNemar's without its approximation); any other by swapping the two
models' results at random, example by example, and counting how often that makes as large a difference (approximate
randomization; of up to 13 examples all swaps there are). Neither needs a normal distribution, and both stay honest for
a handful of examples, where a bootstrap would find any difference significant. Every draw has the same seed.

Left out: a correction for asking many questions at once.

Shapes: N examples, K sums, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
"""``(N, K)``: what each example adds to the sums that a score is made of."""

Value = Callable[[Sums], NDArray[np.float64]]
"""Sums ``(..., K)`` to scores ``(...)``."""

LEVEL = 0.95
"""Of an interval; a difference less likely than the rest by chance is called one."""

_Z = 1.959963984540054  # of the normal distribution, at LEVEL
_SEED = 0
_NUM_RESAMPLED = 2000
_NUM_SWAPPED = 9999
_MOST_EXACT = 13
"""Examples of which all swaps are gone through: there are fewer than of random ones."""
_BLOCK = 2_000_000
"""Random numbers that are there at a time."""


class Interval(NamedTuple):
    """Where a score lies with 95 % confidence."""

    low: float
    high: float


def interval(sums: Sums, value: Value) -> Interval:
    """Confidence interval of a score."""
    if _is_right_or_wrong(sums):
        low, high = _wilson(sums[:, 0].sum(), sums[:, 1].sum())
        return Interval(*value(np.array([[low, 1.0], [high, 1.0]])).tolist())
    generator, found = np.random.default_rng(_SEED), []
    for size in _blocks(_NUM_RESAMPLED, len(sums)):
        counts = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=size)
        found.append(value(counts @ sums))
    tail = (1 - LEVEL) / 2
    return Interval(*np.nanquantile(np.concatenate(found), [tail, 1 - tail]).tolist())


def p_value(before: Sums, after: Sums, value: Value) -> float:
    """How likely a difference as large as that of two models on the same examples is, if they are equally good.

    Args:
        before: of one model.
        after: of the other, with the same examples in the same order.
        value: the score.
    """
    if _is_right_or_wrong(before) and _is_right_or_wrong(after):
        return sign_test(int((after[:, 0] > before[:, 0]).sum()), int((after[:, 0] < before[:, 0]).sum()))
    differing = (before != after).any(axis=1)
    if not differing.any():
        return 1.0
    shift, num_differing = (after - before)[differing], int(differing.sum())
    totals = before.sum(axis=0), after.sum(axis=0)
    found = abs(_difference(*totals, value)) * (1 - 1e-9)  # the same sums in another order round to another number
    if num_differing <= _MOST_EXACT:
        swaps = (np.arange(2**num_differing)[:, None] >> np.arange(num_differing)) & 1
        return float((_swapped(swaps, shift, totals, value) >= found).mean())
    generator, as_large = np.random.default_rng(_SEED), 0
    for size in _blocks(_NUM_SWAPPED, num_differing):
        swaps = generator.integers(0, 2, (size, num_differing), dtype=np.int8)
        as_large += int((_swapped(swaps, shift, totals, value) >= found).sum())
    return (1 + as_large) / (1 + _NUM_SWAPPED)


def sign_test(num_better: int, num_worse: int) -> float:
    """Exact two-sided sign test: how likely so uneven a count is of a fair coin."""
    count = num_better + num_worse
    if not count:
        return 1.0
    ways = (
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        for k in range(min(num_better, num_worse) + 1)
    )
    return min(1.0, 2 * sum(math.exp(way - count * math.log(2)) for way in ways))


def said(p: float, *, is_better: bool, than: str) -> str:
    """The finding in a sentence.

    Args:
        p: from :func:`p_value`.
        is_better: which way the difference goes.
        than: the other model.
    """
    if p >= 1 - LEVEL:
        return f"cannot be told apart from {than}, p = {p:.2g}"
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    return f"{'better' if is_better else 'worse'} than {than}, {shown}"


def _is_right_or_wrong(sums: Sums) -> bool:
    return sums.shape[1] == 2 and bool(np.isin(sums, (0, 1)).all() and (sums[:, 0] <= sums[:, 1]).all())


def _wilson(num_right: float, count: float) -> tuple[float, float]:
    if not count:
        return 0.0, 1.0
    share, spread = num_right / count, _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _difference(before: Sums, after: Sums, value: Value) -> NDArray[np.float64]:
    return value(after) - value(before)


def _swapped(swaps: NDArray, shift: Sums, totals: tuple[Sums, Sums], value: Value) -> NDArray[np.float64]:
    """Sizes of the differences ``(R,)`` with the results of some examples swapped, ``(R, N)``."""
    moved = swaps @ shift
    return np.abs(_difference(totals[0] + moved, totals[1] - moved, value))


def _blocks(count: int, num_examples: int) -> Iterator[int]:
    """Numbers that add up to ``count``."""
    size = max(1, _BLOCK // num_examples)
    return (min(size, count - start) for start in range(0, count, size))
