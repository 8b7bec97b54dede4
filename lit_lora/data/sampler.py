"""Batches as a pure function of (seed, epoch), and a sampler that can start anywhere in an epoch.

The micro-batches of an epoch are one global list. Rank ``r`` of ``W`` takes the micro-batches ``i * W + r``, so that
two processes without accumulation see what one process that accumulates two sees. A position in the data is therefore
a pair of plain numbers, the epoch and the global micro-batches consumed, and no worker or prefetcher holds any state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lit_lora.wording import setting

GROUPED_BATCHES = 50
"""Batches whose examples are sorted by length together, where padding makes that worthwhile."""


@dataclass(frozen=True)
class BatchSettings:
    """What decides which examples form a batch."""

    batch_size: int | None = 4
    """Most examples in a micro-batch; None for no such limit."""
    max_tokens: int | None = None
    """Most tokens in a micro-batch; where batches are padded, including the padding."""
    padded: bool = False
    """Whether every example in a batch costs as much as the longest."""
    shuffle: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size is None and self.max_tokens is None:
            raise ValueError("nothing limits a batch: set batch_size, max_tokens_per_batch or both")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens_per_batch must be at least 1, got {self.max_tokens}")

    def fits(self, num_examples: int, num_tokens: int, longest: int) -> bool:
        """Whether a batch of this many examples, with this sum and maximum of lengths, is within the limits."""
        if self.batch_size is not None and num_examples > self.batch_size:
            return False
        cost = num_examples * longest if self.padded else num_tokens
        return self.max_tokens is None or cost <= self.max_tokens


def plan_batches(lengths: NDArray[np.int64], settings: BatchSettings, epoch: int = 0) -> list[list[int]]:
    """The global micro-batches of an epoch: every example once.

    Consecutive examples of the shuffled order fill a micro-batch until the next would exceed a limit. Where padding
    costs, examples are first sorted by length within groups, and the batches shuffled again. Every epoch has as many
    micro-batches as epoch 0, whatever its order, because Lightning asks for the number once: too few are split, too
    many are distributed over the others.

    Args:
        lengths: tokens of each example, ``(N,)``.
        settings: limits, order and seed.
        epoch: changes the order where ``settings.shuffle``.

    Raises:
        ValueError: if an example alone exceeds the token limit.
    """
    if len(lengths) == 0:
        raise ValueError("there are no examples to make batches of")
    if settings.max_tokens is not None and lengths.max() > settings.max_tokens:
        limit = setting("data.max_tokens_per_batch", settings.max_tokens)
        raise ValueError(
            f"an example of {lengths.max()} tokens exceeds {limit}: raise it, or set "
            f"{setting('data.max_length', settings.max_tokens)}"
        )
    if settings.max_tokens is None:
        return _fill(lengths, settings, epoch)
    reference = _fill(lengths, settings, 0)
    if not settings.shuffle or epoch == 0:
        return reference
    batches = _with_count(_fill(lengths, settings, epoch), len(reference), lengths, settings)
    if batches is None:
        order = permutation(len(reference), settings.seed, epoch, 1)
        batches = [reference[index] for index in order]
    return batches


def permutation(count: int, *seeds: int) -> NDArray[np.int64]:
    """A random order of ``count`` items, the same under every NumPy (which promises that of raw bits only)."""
    return np.argsort(np.random.PCG64([count, *seeds]).random_raw(count), kind="stable")


def split_indices(num_examples: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide examples into training and validation, each in the data's order.

    Raises:
        ValueError: if either would be empty.
    """
    num_validation = round(num_examples * fraction)
    if not 0 < num_validation < num_examples:
        raise ValueError(
            f"{setting('data.validation_fraction', fraction)} of {num_examples} examples is {num_validation}: "
            "both parts need at least one"
        )
    order = permutation(num_examples, seed)
    return np.sort(order[num_validation:]), np.sort(order[:num_validation])


def _fill(lengths: NDArray[np.int64], settings: BatchSettings, epoch: int) -> list[list[int]]:
    order = permutation(len(lengths), settings.seed, epoch) if settings.shuffle else np.arange(len(lengths))
    grouped = settings.padded and settings.shuffle and settings.max_tokens is not None
    if grouped:
        per_batch = settings.batch_size or max(1, int(settings.max_tokens / lengths.mean()))
        size = GROUPED_BATCHES * per_batch
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    batches: list[list[int]] = [[]]
    num_tokens = longest = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        num_tokens, longest = num_tokens + length, max(longest, length)
        if batches[-1] and not settings.fits(len(batches[-1]) + 1, num_tokens, longest):
            batches.append([])
            num_tokens = longest = length
        batches[-1].append(index)
    if grouped:
        batches = [batches[index] for index in permutation(len(batches), settings.seed, epoch, 1)]
    return batches


def _with_count(
    batches: list[list[int]], count: int, lengths: NDArray[np.int64], settings: BatchSettings
) -> list[list[int]] | None:
    """The same examples in exactly ``count`` batches; None if those beyond do not fit into the others."""
    batches, beyond = batches[:count], [index for batch in batches[count:] for index in batch]
    for index in sorted(beyond, key=lambda index: -lengths[index]):
        for batch in batches:
            sizes = lengths[[*batch, index]]
            if settings.fits(len(sizes), int(sizes.sum()), int(sizes.max())):
                batch.append(index)
                break
        else:
            return None
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda index: len(batches[index]))
        batch = batches[largest]
        half = (len(batch) + 1) // 2
        batches[largest : largest + 1] = [batch[:half], batch[half:]]
    return batches


class ResumableBatchSampler(Sampler[list[int]]):
    """One rank's micro-batches of an epoch, from any place in it.

    Lightning makes the first iterator before it calls ``set_epoch``, with workers it even fetches from it, so the
    epoch and the place to start at are fixed on construction. The place is computed from the trainer's own counter of
    processed
    batches: what a prefetcher or a worker has taken does not count.

    Ranks have equally many micro-batches; a missing one is a filler, ``[~index]`` of a short example.

    Args:
        lengths: tokens of each example, ``(N,)``.
        settings: limits, order and seed.
        rank: of this process.
        world_size: processes that share the epoch.
        resume_from: the epoch and the micro-batches of this rank to skip in it.
        progress: the number of this rank's micro-batches processed so far, over all epochs, and the number that makes
            an epoch (fewer than there are under ``limit_train_batches``). Without it the place within an epoch is not
            known.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        settings: BatchSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
        resume_from: tuple[int, int] | None = None,
        progress: Callable[[], tuple[int, float]] | None = None,
    ) -> None:
        self.lengths = lengths
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.epoch, self.start = resume_from or (0, 0)
        self.num_global = len(plan_batches(lengths, settings))
        self._progress = progress
        self._anchor: int | None = None
        self._resumed = resume_from is not None
        self._epoch_offset = 0

    @property
    def sampler(self) -> ResumableBatchSampler:
        """Itself: Lightning passes the epoch to ``dataloader.batch_sampler.sampler``."""
        return self

    def __len__(self) -> int:
        """Micro-batches of this rank in a whole epoch, including those before the start."""
        return -(-self.num_global // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, unless that is the epoch it is in.

        A resumed sampler goes on where it stopped, whatever number the trainer gives that epoch, and counts from there:
        Lightning takes an epoch for done that ``max_steps`` ended in the middle.
        """
        unused = self._anchor is None or (self._progress is not None and self._consumed() == 0)
        current, start = self.position()
        if self._resumed and unused:
            self._epoch_offset = current - epoch
        else:
            self._resumed = False
        if epoch + self._epoch_offset != current:
            current, start = epoch + self._epoch_offset, 0
        self.epoch, self.start = current, start
        self._anchor = self._progress()[0] if self._progress is not None else 0

    def position(self) -> tuple[int, int]:
        """The epoch, and this rank's micro-batches consumed in it; at the end of an epoch, the start of the next."""
        length = len(self) if self._progress is None else min(len(self), self._progress()[1])
        start = self.start + self._consumed()
        return (self.epoch, start) if start < length else (self.epoch + 1, 0)

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator: epoch and place are those of the call, not of the first batch taken.
        epoch, start = self.position()
        batches = plan_batches(self.lengths, self.settings, epoch)
        return iter(rank_batches(batches, self.lengths, self.rank, self.world_size)[start:])

    def _consumed(self) -> int:
        return 0 if self._progress is None or self._anchor is None else self._progress()[0] - self._anchor


def rank_batches(
    batches: Sequence[list[int]], lengths: NDArray[np.int64], rank: int, world_size: int
) -> list[list[int]]:
    """One rank's share of the global micro-batches: equally many for every rank, the missing ones as fillers."""
    share = [list(batch) for batch in batches[rank::world_size]]
    if len(share) < -(-len(batches) // world_size):
        share.append([~int(lengths.argmin())])
    return share
