"""Batches of data that is evaluated: in its order, and each of a single source, so that each source has a loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lit_lora.data.batches.sampler import BatchPlan, BatchSettings, plan_batches, rank_batches


class OrderedBatchSampler(Sampler[list[int]]):
    """One rank's micro-batches of data that is evaluated, in its order; none holds examples of two sources.

    Args:
        lengths: tokens of each example, ``(N,)``.
        settings: limits.
        starts: the first example of each source, and the end.
        rank: of this process.
        world_size: processes that share the data.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        settings: BatchSettings,
        starts: Sequence[int],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = lengths
        self.rank = rank
        self.world_size = world_size
        self._plan = plan_in_order(lengths, settings, starts)

    def __len__(self) -> int:
        """Micro-batches of this rank."""
        return -(-len(self._plan) // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        return rank_batches(self._plan, self.lengths, self.rank, self.world_size)


def plan_in_order(lengths: NDArray[np.int64], settings: BatchSettings, starts: Sequence[int]) -> BatchPlan:
    """The micro-batches of data in its order, each of a single source.

    Args:
        lengths: tokens of each example, ``(N,)``.
        settings: limits.
        starts: the first example of each source, and the end.
    """
    settings = replace(settings, shuffle=False)
    borders: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    for start, stop in itertools.pairwise(starts):
        borders.append(plan_batches(lengths[start:stop], settings).starts[1:] + start)
    return BatchPlan(np.arange(len(lengths)), np.concatenate(borders))
