"""Several sources of training data, and which of their examples an epoch holds.

The examples of an epoch are a pure function of seed, epoch and the sizes of the sources, as the order of its batches is
(see ``sampler.py``). Each source is gone through from end to end, again and again: an epoch takes up where the last one
stopped, so no example comes a second time before all others of its source have come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_lora.wording import setting

_ORDER_OF_A_PASS = 2
"""Tells these random orders from those of the sampler."""


@dataclass(frozen=True)
class DataSource:
    """One of several sources of data."""

    path: str
    """a file, folder, pattern or Hub dataset, as for a single source"""
    weight: float | None = None
    """share of the examples of an epoch: where all sources have weights, relative to their sum; else a fraction below
    1 (0.01 for one replayed example in a hundred), and the sources without weight share the rest by their epochs"""
    epochs: float | None = None
    """how often an epoch of the run goes through this source; 1 if neither this nor weight is given"""
    format: str | None = None
    """as data.format, for this source"""
    columns: dict[str, str] | None = None
    """as data.columns, for this source"""
    name: str | None = None
    """in messages and in metrics (val_loss/NAME); by default the file's name without its ending"""
    limit: int | None = None
    """use only the first rows, this many"""

    def __post_init__(self) -> None:
        if self.weight is not None and self.epochs is not None:
            raise ValueError(f"the source {self.path} has both weight and epochs: give one of them")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise ValueError(f"{name} of the source {self.path} must be above 0, got {value}")
        if self.name is not None and not self.name.strip():
            raise ValueError(f"name of the source {self.path} is empty: leave it out, or give one")


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
            sources: with their weights and epochs.

        Raises:
            ValueError: if the weights leave nothing for sources without.
        """
        check_weights(sources)
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


def check_weights(sources: Sequence[DataSource]) -> None:
    """Check the weights of sources against each other.

    Raises:
        ValueError: if they leave nothing for sources without.
    """
    weights = [source.weight for source in sources]
    total = sum(weight or 0.0 for weight in weights)
    if None in weights and total >= 1:
        without = next(source.path for source in sources if source.weight is None)
        raise ValueError(
            f"the weights of {setting('data.train')} sum up to {total:g}, which leaves nothing of an epoch for {without}"
            ", a source without weight: give fractions that sum up to less than 1, or give every source a weight"
        )


def permutation(count: int, *seeds: int) -> NDArray[np.int64]:
    """A random order of ``count`` items, the same under every NumPy (which promises that of raw bits only)."""
    return np.argsort(np.random.PCG64([count, *seeds]).random_raw(count), kind="stable")


def as_source(given: Any) -> DataSource:
    """A source as it was given: by name, by its settings, or in memory."""
    if isinstance(given, DataSource):
        return given
    if isinstance(given, Mapping):
        known = DataSource.__dataclass_fields__
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"a source has no setting {unknown[0]!r}, expected {', '.join(known)}")
        return DataSource(**given)
    return DataSource(given)
