"""Several sources of training data, and which of their examples an epoch holds.

The examples of an epoch are a pure function of seed, epoch and the sizes of the sources, as the order of its batches is
(see ``sampler.py``). Each source is gone through from end to end, again and again: an epoch takes up where the last one
stopped, so no example comes a second time before all others of its source have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_lora.data.rows.data_source import DataSource
from lit_lora.wording import setting

_ORDER_OF_A_PASS = 2
"""Tells these random orders from those of the sampler."""


@dataclass(frozen=True)
class Mixture:
    """How many examples of each source make an epoch."""

    sizes: tuple[int, ...]
    """Examples of each source."""
    quotas: tuple[int, ...]
    """Examples of each that an epoch takes."""

    @classmethod
    def of(cls, sizes: Sequence[int], sources: Sequence[DataSource]) -> Mixture:
        """What the sources ask for.

        Args:
            sizes: examples of each source.
            sources: with their weights and epochs; see :func:`check_mixture`.
        """
        weights = [source.weight for source in sources]
        counted = [0.0 if s.weight is not None else n * (s.epochs or 1.0) for n, s in zip(sizes, sources, strict=True)]
        shares = [weight or 0.0 for weight in weights]
        if None in weights:
            total = sum(counted) / (1 - sum(shares))
        else:
            total, shares = float(sum(sizes)), [share / sum(shares) for share in shares]
        quotas = [round(number or total * share) for number, share in zip(counted, shares, strict=True)]
        return cls(tuple(sizes), tuple(max(1, quota) for quota in quotas))

    def __len__(self) -> int:
        return sum(self.quotas)

    @property
    def is_plain(self) -> bool:
        """Whether every epoch holds the same examples."""
        return all(quota % size == 0 for size, quota in zip(self.sizes, self.quotas, strict=True))

    def examples(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The examples of an epoch, source by source, as places in all sources one after the other.

        Args:
            seed: of the order in which a source is gone through.
            epoch: from 0.
        """
        chosen: list[NDArray[np.int64]] = []
        start = 0
        for number, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            place, end = epoch * quota, (epoch + 1) * quota
            while place < end:
                through, first = divmod(place, size)
                stop = min(size, first + end - place)
                if stop - first == size:
                    chosen.append(np.arange(size) + start)
                else:
                    order = permutation(size, seed, through, number, _ORDER_OF_A_PASS)
                    chosen.append(np.sort(order[first:stop]) + start)
                place += stop - first
            start += size
        return np.concatenate(chosen)


def check_mixture(sources: Sequence[DataSource], key: str) -> None:
    """Check the weights of sources against each other.

    Args:
        sources: of training data.
        key: of their setting.

    Raises:
        ValueError: if they leave nothing for sources without, or there is nothing to weigh.
    """
    weights = [source.weight for source in sources]
    if len(sources) == 1 and weights[0] is not None:
        raise ValueError(
            f"{setting(key)} is a single source, {sources[0].name}, so its weight has no effect: leave it out"
        )
    total = sum(weight or 0.0 for weight in weights)
    if None in weights and total >= 1:
        without = next(source.name for source in sources if source.weight is None)
        raise ValueError(
            f"the weights of {setting(key)} sum up to {total:g}, which leaves nothing of an epoch for {without}, a "
            "source without weight: give fractions that sum up to less than 1, or give every source one"
        )


def check_no_mixture(sources: Sequence[DataSource], key: str) -> None:
    """Check that nothing is weighed where each example is looked at once.

    Raises:
        ValueError: if it is.
    """
    for source in sources:
        for name in ("weight", "epochs"):
            if getattr(source, name) is not None:
                raise ValueError(
                    f"{name} of {source.name} has no effect in {setting(key)}, of which each example is looked at "
                    "once: leave it out"
                )


def permutation(count: int, *seeds: int) -> NDArray[np.int64]:
    """A random order of ``count`` items, the same under every NumPy (which promises that of raw bits only)."""
    return np.argsort(np.random.PCG64([count, *seeds]).random_raw(count), kind="stable")
