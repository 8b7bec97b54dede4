"""Batches: targets belong to their example, whatever the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.chats.tokenize import Encoded
from lit_lora.data.prepared.dataset import DatasetStatistics, TokenizedDataset, check_vocabulary

STATISTICS = DatasetStatistics("data.jsonl", "text", 0, 0, 0, 0, 0)


def dataset_of(*examples: tuple[list[int], list[int]]) -> TokenizedDataset:
    encoded = [Encoded(10 + i, ids, [bool(m) for m in mask], False) for i, (ids, mask) in enumerate(examples)]
    return TokenizedDataset.from_encoded(encoded, STATISTICS)


THREE = dataset_of(([5, 6, 7, 8], [0, 0, 1, 1]), ([9, 1, 2], [0, 1, 0]), ([3, 4, 3, 4, 3], [0, 1, 0, 0, 1]))


def test_packed_batch() -> None:
    batch = collate_packed([THREE[0], THREE[1], THREE[2]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 3, 4, 3, 4, 3]], "what follows the last target is cut off"
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4]]
    assert batch["cu_seq_lens"].tolist() == [0, 4, 6, 11]
    assert batch["cu_seq_lens"].dtype == torch.int32
    assert batch["num_tokens"] == 11
    assert batch["target_positions"].tolist() == [1, 2, 4, 6, 9]
    assert batch["target_ids"].tolist() == [7, 8, 1, 4, 3]
    assert batch["example_ids"].tolist() == [0, 1, 2]


def test_padded_batch() -> None:
    batch = collate_padded([THREE[0], THREE[1], THREE[2]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0], [9, 1, 0, 0, 0], [3, 4, 3, 4, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["target_positions"].tolist() == [1, 2, 5, 10, 13]
    assert batch["target_ids"].tolist() == [7, 8, 1, 4, 3]
    assert batch["num_tokens"] == 11


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_filler_has_shape_but_no_target(collate) -> None:
    batch = collate([THREE[~1]])
    assert batch["input_ids"].tolist() == [[9]]
    assert batch["target_positions"].shape == batch["target_ids"].shape == (0,)
    assert batch["target_positions"].dtype == batch["target_ids"].dtype == torch.int64
    assert batch["num_tokens"] == 0
    assert batch["example_ids"].tolist() == [-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=12), min_size=1, max_size=6))
def test_layouts_agree_on_what_is_predicted_from_what(masks) -> None:
    rng = np.random.default_rng(0)
    masks = [[0, *mask[:-1], 1] for mask in masks]
    data = dataset_of(*((rng.integers(0, 50, len(mask)).tolist(), mask) for mask in masks))
    examples = [data[i] for i in range(len(data))]
    expected = [
        (int(example.ids[k - 1]), int(example.ids[k]))
        for example in examples
        for k in range(1, len(example.ids))
        if example.mask[k]
    ]
    for collate in (collate_packed, collate_padded):
        batch = collate(examples)
        flat = batch["input_ids"].flatten()
        assert (
            list(zip(flat[batch["target_positions"]].tolist(), batch["target_ids"].tolist(), strict=True)) == expected
        )
        assert torch.equal(flat[batch["target_positions"] + 1], batch["target_ids"]), "within the example"


def test_dataset_survives_saving_and_selecting(tmp_path) -> None:
    THREE.save(tmp_path / "deep" / "a.safetensors")
    loaded = TokenizedDataset.load(tmp_path / "deep" / "a.safetensors")
    assert loaded.statistics == STATISTICS
    for data, order in ((loaded, [0, 1, 2]), (loaded.select(np.array([2, 0])), [2, 0])):
        assert len(data) == len(order)
        for place, index in enumerate(order):
            assert data[place].ids.tolist() == THREE[index].ids.tolist()
            assert data[place].mask.tolist() == THREE[index].mask.tolist()
            assert data.lines[place] == 10 + index


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:-3] + b"xyz", lambda b: b"", lambda b: b"{}" * 50])
def test_damaged_cache_files_are_recognised(tmp_path, damage) -> None:
    path = tmp_path / "a.safetensors"
    THREE.save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        TokenizedDataset.load(path)


def test_tokens_outside_the_vocabulary_are_named() -> None:
    check_vocabulary(THREE, 10)
    with pytest.raises(ValueError, match=r"token id 9 \(data.jsonl, line 11\) is outside the model's vocabulary of 9"):
        check_vocabulary(THREE, 9)
