"""A resume with other data, settings or classes: exact, or refused by name."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch

from lit_lora.data.datamodule import SFTDataModule
from tests.data.resume_runs import (
    SMALL_RUNS,
    Recorder,
    SaveAt,
    Stopped,
    data_module,
    run,
    trainer,
    whole_run,
)

pytestmark = SMALL_RUNS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 5}, "batch_size was 2 and is 5"),
        ({"packing": False}, "packing was True and is False"),
        ({"limit": 9}, "data.limit was None and is 9"),
        ({"max_length": 40}, "max_length was 1024 and is 40"),
    ],
)
def test_resume_with_other_settings_is_refused(data_file, checkpoint, data, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(data_file, Recorder(align=True), ckpt_path=checkpoint, data=data)


def test_resume_with_other_data_is_refused(data_file, checkpoint, tmp_path) -> None:
    other = tmp_path / "train.jsonl"
    other.write_text(data_file.read_text().replace("question 3", "question x"))
    with pytest.raises(ValueError, match=r"data\.train was .* and is "):
        run(other, Recorder(align=True), ckpt_path=checkpoint)


class Renamed(SFTDataModule):
    """What a user's script may derive."""


def in_a_function() -> type[SFTDataModule]:
    class Local(SFTDataModule):
        pass

    return Local


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [(SFTDataModule, Renamed), (Renamed, SFTDataModule), (Renamed, in_a_function()), (in_a_function(), Renamed)],
)
def test_a_class_of_another_name_resumes_in_the_same_place(data_file, tmp_path, saved_by, resumed_by) -> None:
    path, first, resumed = tmp_path / "stopped.ckpt", Recorder(align=True), Recorder(align=True)
    options = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": data_file.parent / "cache"}
    stopping = trainer(callbacks=[SaveAt(path, "on_train_batch_end", 7)])
    with pytest.raises(Stopped):
        stopping.fit(first, datamodule=saved_by(str(data_file), **options))
    trainer().fit(resumed, datamodule=resumed_by(str(data_file), **options), ckpt_path=path)
    whole = whole_run(data_file, None, {})
    assert first.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        trainer().fit(Recorder(align=True), datamodule=resumed_by(str(data_file), seed=1, **options), ckpt_path=path)


def test_a_class_of_another_name_is_refused_where_the_module_aligns_nothing(data_file, checkpoint) -> None:
    data = Renamed(str(data_file), tokenizer="bytes", batch_size=2, cache_dir=data_file.parent / "cache")
    with pytest.raises(ValueError, match=r"stopped\.ckpt holds no position in the data of Renamed"):
        trainer().fit(Recorder(align=False), datamodule=data, ckpt_path=checkpoint)


@pytest.mark.parametrize("named", ["a plain loader", "Plain"])
def test_data_without_positions_cannot_continue_from_one(data_file, checkpoint, named) -> None:
    class Plain(pl.LightningDataModule):
        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader([{"example_ids": torch.tensor([0]), "target_ids": torch.ones(1)}])

    Plain.__qualname__ = "Plain"
    data = {"datamodule": Plain()} if named == "Plain" else {"train_dataloaders": Plain().train_dataloader()}
    with pytest.raises(ValueError, match=f"in the data of SFTDataModule, and this run's data come from {named}, which"):
        trainer().fit(Recorder(align=True), **data, ckpt_path=checkpoint)


def test_validating_a_checkpoint_with_other_settings_is_fine(data_file, checkpoint) -> None:
    data = data_module(data_file, validation_fraction=0.2, seed=3)
    trainer().validate(Recorder(align=True), datamodule=data, ckpt_path=checkpoint, verbose=False)
