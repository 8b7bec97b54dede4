"""Several sources: how much of each an epoch holds, in which order, and where a resumed run goes on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.data.batches.mixture import Mixture
from lit_lora.data.batches.sampler import BatchSettings, ResumableBatchSampler, plan_batches
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.data.rows.data_source import DataSource
from tests.data.resume_runs import SMALL_RUNS, Recorder, SaveAt, Stopped, trainer


def mixture(*sources: tuple[int, dict[str, float]]) -> Mixture:
    return Mixture.of(
        [size for size, _ in sources], [DataSource(f"{i}.jsonl", **s) for i, (_, s) in enumerate(sources)]
    )


@pytest.mark.parametrize(
    ("sources", "quotas"),
    [
        ([(100, {}), (50, {})], (100, 50)),
        ([(100, {"epochs": 2}), (50, {"epochs": 0.5})], (200, 25)),
        ([(990, {}), (5000, {"weight": 0.01})], (990, 10)),
        ([(90, {"epochs": 2}), (7, {"weight": 0.1})], (180, 20)),
        ([(100, {"weight": 3}), (300, {"weight": 1})], (300, 100)),
        ([(100, {"weight": 0.5}), (300, {"weight": 0.5})], (200, 200)),
        ([(10, {"epochs": 0.01})], (1,)),
    ],
)
def test_an_epoch_holds_what_the_sources_ask_for(sources, quotas) -> None:
    assert mixture(*sources).quotas == quotas


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    epochs=st.lists(st.sampled_from([0.3, 0.5, 1, 1.7, 2]), min_size=3, max_size=3),
    seed=st.integers(0, 3),
)
def test_no_example_comes_again_before_all_others_of_its_source(sizes, epochs, seed) -> None:
    mixed = mixture(*((size, {"epochs": often}) for size, often in zip(sizes, epochs, strict=False)))
    seen: Counter[int] = Counter()
    for epoch in range(6):
        chosen = mixed.examples(seed, epoch)
        assert chosen.tolist() == mixed.examples(seed, epoch).tolist(), "a pure function"
        assert len(chosen) == len(mixed)
        seen.update(chosen.tolist())
        start = 0
        for size in sizes:
            counts = [seen[index] for index in range(start, start + size)]
            assert max(counts) - min(counts) <= 1
            start += size


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=60),
    weight=st.sampled_from([0.05, 0.3, 0.7]),
    max_tokens=st.none() | st.integers(40, 120),
    padded=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_epoch_of_a_mixture_has_as_many_batches_within_the_limits(
    lengths, weight, max_tokens, padded, shuffle
) -> None:
    half = len(lengths) // 2
    mixed = mixture((half, {}), (len(lengths) - half, {"weight": weight}))
    sizes, options = np.array(lengths), BatchSettings(5, max_tokens, padded=padded, shuffle=shuffle)
    count = len(plan_batches(sizes, options, mixture=mixed))
    for epoch in range(5):
        plan = plan_batches(sizes, options, epoch, mixed)
        assert len(plan) == count
        assert sum(map(len, plan)) == len(mixed)
        for batch in plan:
            cost = len(batch) * sizes[batch].max() if padded else sizes[batch].sum()
            assert 0 < len(batch) <= 5
            assert max_tokens is None or cost <= max_tokens


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_sampler_of_a_mixture_starts_anywhere(world_size) -> None:
    mixed = mixture((20, {}), (50, {"weight": 0.25}))
    lengths = np.random.default_rng(0).integers(5, 60, 70)
    options = BatchSettings(3, 120)
    whole = [list(plan_batches(lengths, options, epoch, mixed)) for epoch in range(2)]
    for start in range(len(whole[1]) // world_size):
        ranks = [
            ResumableBatchSampler(
                lengths, options, rank=rank, world_size=world_size, resume_from=(1, start), mixture=mixed
            )
            for rank in range(world_size)
        ]
        steps = [batch for step in zip(*ranks, strict=True) for batch in step if batch[0] >= 0]
        assert steps == whole[1][start * world_size :]


def write(folder: Path, name: str, count: int) -> str:
    path = folder / f"{name}.jsonl"
    rows = [{"prompt": f"{name} {i}", "completion": "answer " * (1 + i % 3)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def module(folder: Path, **options: Any) -> SFTDataModule:
    train = [
        {"path": write(folder, "own", 9), "epochs": 2},
        {"path": write(folder, "general", 40), "weight": 0.1, "name": "replay"},
    ]
    return SFTDataModule(train, **{"tokenizer": "bytes", "batch_size": 3, "cache_dir": folder / "cache", **options})


@pytest.mark.parametrize("batches", [1, 4, 7, 9])
@pytest.mark.parametrize("hook", ["on_train_batch_end"])
def test_a_run_on_a_mixture_goes_on_where_it_was_stopped(tmp_path, hook, batches) -> None:
    whole = Recorder(align=True)
    trainer(limit_val_batches=0).fit(whole, datamodule=module(tmp_path))
    assert {index for batch in whole.seen for index in batch if index >= 9}, "examples are replayed"
    first = Recorder(align=True)
    with pytest.raises(Stopped):
        trainer(limit_val_batches=0, callbacks=[SaveAt(tmp_path / "a.ckpt", hook, batches)]).fit(
            first, datamodule=module(tmp_path)
        )
    resumed = Recorder(align=True)
    trainer(limit_val_batches=0).fit(resumed, datamodule=module(tmp_path), ckpt_path=tmp_path / "a.ckpt")
    assert first.seen + resumed.seen == whole.seen
    assert resumed.weight.item() == whole.weight.item()


def test_another_weight_is_refused_on_resume(tmp_path) -> None:
    data = module(tmp_path)
    data.setup("fit")
    list(data.train_dataloader())
    state = data.state_dict()
    other = SFTDataModule(
        [{"path": str(tmp_path / "own.jsonl"), "epochs": 2}, {"path": str(tmp_path / "general.jsonl"), "weight": 0.5}],
        tokenizer="bytes", batch_size=3, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    other.setup("fit")
    with pytest.raises(
        ValueError, match=r"data\.mixture was \[\[9, 40\], \[18, 2\]\] and is \[\[9, 40\], \[18, 18\]\]"
    ):
        other.load_state_dict(state)


def test_validation_batches_are_of_one_source_each(tmp_path) -> None:
    data = module(tmp_path, validation_fraction=0.4)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [(batch["source"], len(batch["example_ids"])) for batch in batches] == [
        (0, 3), (0, 1), *[(1, 3)] * 5, (1, 1),
    ]  # fmt: skip
    assert data.source_names("validate") == ["own", "replay"]


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ([{"path": "a.jsonl", "weight": 1.0, "epochs": 2}], "has both weight and epochs"),
        ([{"path": "a.jsonl", "weight": -1}, "b.jsonl"], "weight of the source a.jsonl must be above 0, got -1"),
        ([{"path": "a.jsonl", "epochs": float("inf")}, "b.jsonl"], "epochs of the source a.jsonl must be above 0"),
        ([{"path": "a.jsonl", "weight": 1.0}], "its weight has no effect"),
        ([{"path": "a.jsonl", "weight": 1}, "b.jsonl"], "leaves nothing of an epoch for b, a source without weight"),
    ],
)
def test_weights_that_make_no_sense(train, told) -> None:
    with pytest.raises(ValueError, match=told):
        SFTDataModule(train)


def test_weights_in_validation_have_no_effect_and_are_refused() -> None:
    with pytest.raises(ValueError, match="epochs of b has no effect in validation"):
        SFTDataModule("a.jsonl", validation=["c.jsonl", DataSource("b.jsonl", epochs=2)])


pytestmark = SMALL_RUNS
