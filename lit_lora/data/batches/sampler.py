"""Batches as a pure function of (seed, epoch), and a sampler that can start anywhere in an epoch.

The micro-batches of an epoch are one global list. Rank ``r`` of ``W`` takes the micro-batches ``i * W + r``, so that
two processes without accumulation see what one process that accumulates two sees. A position in the data is therefore
a pair of plain numbers, the epoch and the global micro-batches consumed, and no worker or prefetcher holds any state.
"""

from __future__ import annotations

import array
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lit_lora.data.batches.mixture import Mixture, permutation
from lit_lora.wording import setting

GROUPED_BATCHES = 50
"""Batches whose examples are sorted by length together, where padding makes that worthwhile."""

_PIECE = 2**14
"""Items that are looked at together."""


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


class BatchPlan(Sequence[list[int]]):
    """The micro-batches of an epoch, each a list of examples, held as two arrays.

    Args:
        order: examples, batch after batch, ``(N,)``.
        starts: where each batch begins in it, and the end, ``(B + 1,)``.
    """

    def __init__(self, order: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        self.order = order
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        batch: list[int] = self.order[self.starts[number] : self.starts[number + 1]].tolist()
        return batch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Examples of each batch, ``(B,)``."""
        return np.diff(self.starts)

    def rearranged(self, batches: NDArray[np.int64]) -> BatchPlan:
        """The same batches in another order."""
        counts = self.counts[batches]
        starts = np.concatenate([[0], counts.cumsum()])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        return BatchPlan(self.order[np.repeat(self.starts[batches], counts) + within], starts)


def plan_batches(
    lengths: NDArray[np.int64], settings: BatchSettings, epoch: int = 0, mixture: Mixture | None = None
) -> BatchPlan:
    """The global micro-batches of an epoch: every example once, or as often as a mixture says.

    Consecutive examples of the shuffled order fill a micro-batch until the next would exceed a limit. Where padding
    costs, examples are first sorted by length within groups, and the batches shuffled again. Every epoch has as many
    micro-batches as epoch 0, whatever its order, because Lightning asks for the number once: too few are split, too
    many are distributed over the others. Of a mixture whose epochs hold different examples, a few more are planned
    for; where even those do not suffice, the examples of epoch 0 come again, in another order.

    Args:
        lengths: tokens of each example, ``(N,)``.
        settings: limits, order and seed.
        epoch: changes the order where ``settings.shuffle``, and the examples of a mixture.
        mixture: which examples an epoch holds.

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
        return _fill(lengths, settings, epoch, mixture)
    varies = mixture is not None and not mixture.is_plain
    reference = _fill(lengths, settings, 0, mixture)
    count = len(reference)
    if varies:
        count = min(len(reference.order), count + math.isqrt(count) + 1)
    if epoch == 0 or not (settings.shuffle or varies):
        return reference if count == len(reference) else _split(reference, count)
    plan = _with_count(_fill(lengths, settings, epoch, mixture), count, lengths, settings)
    if plan is None:
        plan = _split(reference, count).rearranged(permutation(count, settings.seed, epoch, 1))
    return plan


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


def _fill(lengths: NDArray[np.int64], settings: BatchSettings, epoch: int, mixture: Mixture | None) -> BatchPlan:
    if mixture is None:
        order = permutation(len(lengths), settings.seed, epoch) if settings.shuffle else np.arange(len(lengths))
    else:
        order = mixture.examples(settings.seed, epoch)
        if settings.shuffle:
            order = order[permutation(len(order), settings.seed, epoch)]
    if settings.max_tokens is None:
        assert settings.batch_size is not None
        starts = np.append(np.arange(0, len(order), settings.batch_size), len(order))
        return BatchPlan(order, starts)
    if not settings.padded:
        return BatchPlan(order, _starts_packed(lengths[order], settings.max_tokens, settings.batch_size))
    grouped = settings.shuffle
    if grouped:
        per_batch = settings.batch_size or max(1, int(settings.max_tokens / lengths.mean()))
        size = GROUPED_BATCHES * per_batch
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")] for chunk in chunks])
    plan = BatchPlan(order, _starts_padded(lengths[order], settings))
    return plan.rearranged(permutation(len(plan), settings.seed, epoch, 1)) if grouped else plan


def _starts_packed(lengths: NDArray[np.int64], max_tokens: int, batch_size: int | None) -> NDArray[np.int64]:
    """Where batches begin that are each filled until the next example would exceed a limit."""
    ends = lengths.cumsum()
    # From every place, where a batch that begins there ends.
    stops = np.searchsorted(ends, ends - lengths + max_tokens, side="right")
    if batch_size is not None:
        stops = np.minimum(stops, np.arange(len(lengths)) + batch_size)
    starts = array.array("q", [0])
    while starts[-1] < len(lengths):
        starts.append(int(stops[starts[-1]]))
    return np.frombuffer(starts, np.int64)


def _starts_padded(lengths: NDArray[np.int64], settings: BatchSettings) -> NDArray[np.int64]:
    """Likewise, where every example costs as much as the longest of its batch."""
    starts = array.array("q", [0])
    longest = 0
    for piece in range(0, len(lengths), _PIECE):
        for place, length in enumerate(lengths[piece : piece + _PIECE].tolist(), start=piece):
            longest = max(longest, length)
            if not settings.fits(place - starts[-1] + 1, 0, longest) and place > starts[-1]:
                starts.append(place)
                longest = length
    starts.append(len(lengths))
    return np.frombuffer(starts, np.int64)


def _with_count(plan: BatchPlan, count: int, lengths: NDArray[np.int64], settings: BatchSettings) -> BatchPlan | None:
    """The same examples in exactly ``count`` batches; None if those beyond do not fit into the others."""
    if len(plan) <= count:
        return _split(plan, count)
    kept, beyond = plan.order[: plan.starts[count]], plan.order[plan.starts[count] :]
    starts = plan.starts[:count]
    counts = plan.counts[:count].copy()
    tokens = np.add.reduceat(lengths[kept], starts)
    longest = np.maximum.reduceat(lengths[kept], starts)
    chosen = []
    for index in beyond[np.argsort(-lengths[beyond], kind="stable")].tolist():
        length = int(lengths[index])
        batch = _first_that_fits(length, counts, tokens, longest, settings)
        if batch is None:
            return None
        counts[batch] += 1
        tokens[batch] += length
        longest[batch] = max(int(longest[batch]), length)
        chosen.append(batch)
    batch_of = np.concatenate([np.repeat(np.arange(count), plan.counts[:count]), np.array(chosen, dtype=np.int64)])
    added = beyond[np.argsort(-lengths[beyond], kind="stable")]
    order = np.concatenate([kept, added])[np.argsort(batch_of, kind="stable")]
    return BatchPlan(order, np.concatenate([[0], counts.cumsum()]))


def _first_that_fits(
    length: int,
    counts: NDArray[np.int64],
    tokens: NDArray[np.int64],
    longest: NDArray[np.int64],
    settings: BatchSettings,
) -> int | None:
    """The first batch that has room for an example."""
    assert settings.max_tokens is not None
    for start in range(0, len(counts), _PIECE):
        piece = slice(start, start + _PIECE)
        more = counts[piece] + 1
        cost = more * np.maximum(longest[piece], length) if settings.padded else tokens[piece] + length
        fits = cost <= settings.max_tokens
        if settings.batch_size is not None:
            fits &= more <= settings.batch_size
        if fits.any():
            return start + int(fits.argmax())
    return None


def _split(plan: BatchPlan, count: int) -> BatchPlan:
    """The same examples in ``count`` batches, of which there are fewer: the largest are halved."""
    starts = plan.starts
    while len(starts) <= count:
        counts = np.diff(starts)
        largest = int(counts.argmax())
        starts = np.insert(starts, largest + 1, starts[largest] + (counts[largest] + 1) // 2)
    return BatchPlan(plan.order, starts)


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
        mixture: which examples an epoch holds; each once without.
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
        mixture: Mixture | None = None,
    ) -> None:
        self.lengths = lengths
        self.mixture = mixture
        self.settings = settings
        self.rank = rank
        self.world_size = world_size
        self.epoch, self.start = resume_from or (0, 0)
        self.num_global = len(plan_batches(lengths, settings, mixture=mixture))
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
        batches = plan_batches(self.lengths, self.settings, epoch, self.mixture)
        return rank_batches(batches, self.lengths, self.rank, self.world_size, start)

    def _consumed(self) -> int:
        return 0 if self._progress is None or self._anchor is None else self._progress()[0] - self._anchor


def rank_batches(
    batches: Sequence[list[int]], lengths: NDArray[np.int64], rank: int, world_size: int, start: int = 0
) -> Iterator[list[int]]:
    """One rank's share of the global micro-batches: equally many for every rank, the missing ones as fillers.

    Args:
        batches: of an epoch.
        lengths: tokens of each example, ``(N,)``.
        rank: of the process.
        world_size: processes that share the epoch.
        start: batches of the share to skip.
    """
    filler = ~int(lengths.argmin())
    numbers = range(rank + start * world_size, -(-len(batches) // world_size) * world_size, world_size)
    return (list(batches[number]) if number < len(batches) else [filler] for number in numbers)
