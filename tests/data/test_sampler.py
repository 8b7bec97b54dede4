"""Batches as a pure function of seed and epoch, shared by ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.data.batches.sampler import BatchSettings, ResumableBatchSampler, plan_batches, rank_batches

LENGTHS = np.random.default_rng(0).integers(5, 60, 201)
SETTINGS = {
    "count": BatchSettings(batch_size=4),
    "budget": BatchSettings(batch_size=None, max_tokens=200),
    "both": BatchSettings(batch_size=6, max_tokens=200),
    "padded budget": BatchSettings(batch_size=None, max_tokens=200, padded=True),
    "ordered": BatchSettings(batch_size=None, max_tokens=200, shuffle=False),
}


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    batch_size=st.none() | st.integers(1, 7),
    max_tokens=st.none() | st.integers(40, 120),
    padded=st.booleans(),
    shuffle=st.booleans(),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 30),
)
def test_every_example_once_an_epoch_within_the_limits(
    lengths, batch_size, max_tokens, padded, shuffle, seed, epoch
) -> None:
    if batch_size is None and max_tokens is None:
        batch_size = 3
    sizes = np.array(lengths)
    options = BatchSettings(batch_size, max_tokens, padded=padded, shuffle=shuffle, seed=seed)
    batches = plan_batches(sizes, options, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert batch_size is None or len(batch) <= batch_size
        cost = len(batch) * sizes[batch].max() if padded else sizes[batch].sum()
        assert max_tokens is None or cost <= max_tokens
    assert batches == plan_batches(sizes, options, epoch)
    assert len(batches) == len(plan_batches(sizes, options, 0)), "Lightning asks for the number once"


@pytest.mark.parametrize("name", SETTINGS)
def test_order_depends_on_seed_and_epoch_only_where_shuffled(name) -> None:
    options = SETTINGS[name]
    plans = [
        plan_batches(LENGTHS, options, 0),
        plan_batches(LENGTHS, options, 1),
        plan_batches(LENGTHS, replace(options, seed=1), 0),
    ]
    assert (plans[0] != plans[1]) == (plans[0] != plans[2]) == options.shuffle


def test_the_order_is_the_same_everywhere_and_always() -> None:
    """A changed order would break the resuming of old checkpoints."""
    assert plan_batches(LENGTHS[:12], BatchSettings(batch_size=3), 1) == [[11, 5, 4], [1, 8, 3], [2, 0, 6], [7, 10, 9]]


def test_a_budget_is_filled() -> None:
    packed = plan_batches(LENGTHS, SETTINGS["budget"], 3)
    assert LENGTHS.sum() / (200 * len(packed)) > 0.85


def test_padded_batches_are_grouped_by_length() -> None:
    def padding(options: BatchSettings) -> float:
        batches = plan_batches(LENGTHS, options, 2)
        return 1 - LENGTHS.sum() / sum(len(batch) * LENGTHS[batch].max() for batch in batches)

    assert padding(SETTINGS["padded budget"]) < 0.1 < padding(BatchSettings(batch_size=6, padded=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": None}, "nothing limits a batch"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"max_tokens": 0}, "max_tokens_per_batch must be at least 1, got 0"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSettings(**options)


def test_examples_beyond_the_budget_and_empty_data_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"an example of 59 tokens exceeds max_tokens_per_batch=50: raise it, or set max_length=50"
    ):
        plan_batches(LENGTHS, BatchSettings(max_tokens=50))
    with pytest.raises(ValueError, match="no examples"):
        plan_batches(LENGTHS[:0], BatchSettings())


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_share_what_one_process_accumulates(name, world_size) -> None:
    whole = plan_batches(LENGTHS, SETTINGS[name], 2)
    ranks = []
    for rank in range(world_size):
        sampler = ResumableBatchSampler(LENGTHS, SETTINGS[name], rank=rank, world_size=world_size)
        sampler.set_epoch(2)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    steps = [[batch for batch in step if batch[0] >= 0] for step in zip(*ranks, strict=True)]
    assert steps == [whole[start : start + world_size] for start in range(0, len(whole), world_size)]


def test_missing_batches_of_the_last_step_are_fillers() -> None:
    share = [list(rank_batches([[0], [1], [2], [3], [4]], LENGTHS, rank, 3)) for rank in range(3)]
    assert share == [[[0], [3]], [[1], [4]], [[2], [~int(LENGTHS.argmin())]]]


def test_sampler_starts_anywhere_and_goes_on_with_whole_epochs() -> None:
    options = SETTINGS["budget"]
    sampler = ResumableBatchSampler(LENGTHS, options, rank=1, world_size=2, resume_from=(1, 3))
    assert sampler.sampler is sampler
    expected = list(rank_batches(plan_batches(LENGTHS, options, 1), LENGTHS, 1, 2))
    iterator = iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == list(sampler) == expected[3:]
    assert len(sampler) == len(expected), "a whole epoch, so that the trainer's counters fit"
    sampler.set_epoch(2)
    assert list(sampler) == list(rank_batches(plan_batches(LENGTHS, options, 2), LENGTHS, 1, 2))


def test_a_prefetcher_does_not_move_the_position() -> None:
    processed = 0
    sampler = ResumableBatchSampler(LENGTHS, SETTINGS["count"], progress=lambda: (processed, float("inf")))
    iterator = iter(sampler)
    sampler.set_epoch(0)
    for _ in range(20):
        next(iterator)
    processed = 4
    assert sampler.position() == (0, 4)
    processed = len(sampler)
    assert sampler.position() == (1, 0), "the end of an epoch is the start of the next"
