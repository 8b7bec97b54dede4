"""The record of the metrics: as long as the run in its file, of one size in a checkpoint, and complete after a stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_lora.metrics import StepMetrics, TrainingMetrics
from lit_lora.training.metrics_record import MetricsRecord

STEP = StepMetrics(1, 2.0 / 3, 1.0, 0.1, 5.0, 1e-3, 0.25, 100, 40)


def measured(record: MetricsRecord, first: int, last: int) -> None:
    """Take steps, the fifth without a target, and validate after every second one."""
    for step in range(first, last + 1):
        empty = {"loss": math.nan, "num_target_tokens": 0} if step == 5 else {"loss": 10 / step}
        record.metrics.steps.append(replace(STEP, step=step, **empty))
        if step % 2 == 0:
            record.metrics.validation.append({"step": step, "val_loss": 7 / step})


def kept(folder: Path) -> MetricsRecord:
    folder.mkdir(exist_ok=True)
    record = MetricsRecord()
    record.keep_in(folder)
    return record


def resumed(state: dict[str, Any], folder: Path, *others: Path) -> MetricsRecord:
    record = kept(folder)
    record.load_state_dict(json.loads(json.dumps(state)), [folder, *others])
    return record


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_checkpoint_does_not_grow_with_the_steps(tmp_path):
    record, sizes = kept(tmp_path), []
    for last in (10, 10_000):
        measured(record, len(record.metrics.steps) + 1, last)
        sizes.append(len(json.dumps(record.state_dict())))
    assert sizes[1] - sizes[0] < 10  # the digits of a number
    assert sizes[0] < 200 + len(str(tmp_path))
    assert len(lines(tmp_path)) == 15_000


@pytest.mark.parametrize("written_at", [{8}, {1, 4, 5, 8}, {2, 3, 4, 5, 6, 7, 8}])
def test_the_file_is_the_same_however_often_it_was_written(tmp_path, written_at):
    record = kept(tmp_path)
    for step in range(1, 9):
        measured(record, step, step)
        if step in written_at:
            record.save()
    assert (tmp_path / "metrics.jsonl").read_text() == record.metrics.to_jsonl()
    assert [(entry["step"], "val_loss" in entry) for entry in lines(tmp_path)[:4]] == [
        (1, False), (2, False), (2, True), (3, False),
    ]  # fmt: skip
    assert lines(tmp_path)[6]["loss"] is None
    assert TrainingMetrics.load(tmp_path / "metrics.jsonl").to_jsonl() == record.metrics.to_jsonl()


def test_a_line_that_is_being_written_does_not_count(tmp_path):
    record = kept(tmp_path)
    measured(record, 1, 3)
    record.save()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [step.step for step in TrainingMetrics.load(tmp_path / "metrics.jsonl").steps] == [1, 2, 3]


@pytest.mark.parametrize("later", [0, 1, 2, 5])
def test_what_was_written_after_the_checkpoint_goes_and_is_kept_beside(tmp_path, later):
    whole, record = kept(tmp_path / "whole"), kept(tmp_path / "run")
    measured(whole, 1, 9)
    whole.save()
    measured(record, 1, 4)
    state = record.state_dict()
    measured(record, 5, 4 + later)
    record.metrics.steps[4:] = [replace(step, step_time_s=0.5) for step in record.metrics.steps[4:]]
    record.save()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = resumed(state, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before  # a resume may yet be refused
    measured(again, 5, 9)
    again.save()
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert [path.read_bytes() for path in (tmp_path / "run").glob("metrics.*.jsonl")] == [before] * bool(later)


def test_a_checkpoint_of_a_part_that_was_gone_back_before_can_be_resumed_from(tmp_path):
    record = kept(tmp_path)
    measured(record, 1, 2)
    early = record.state_dict()
    measured(record, 3, 8)
    late = record.state_dict()
    other = resumed(early, tmp_path)
    other.metrics.steps.append(replace(STEP, step=3, loss=99.0))
    other.save()
    back = resumed(late, tmp_path)
    assert back.metrics.to_jsonl() == record.metrics.to_jsonl()
    back.save()
    assert lines(tmp_path) == [json.loads(line) for line in record.metrics.to_jsonl().splitlines()]


@pytest.mark.parametrize("harm", ["full", "file lost", "folder lost"])
def test_what_cannot_be_written_for_a_while_is_in_the_checkpoint_and_later_in_the_file(tmp_path, harm, monkeypatch):
    folder, away = tmp_path / "run", tmp_path / "away"
    record = kept(folder)
    measured(record, 1, 4)
    record.save()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        if harm == "file lost":
            (folder / "metrics.jsonl").unlink()
        elif harm == "folder lost":
            folder.rename(away)
            folder.write_text("in the way")
        measured(record, 5, 7)
        with pytest.warns(UserWarning, match=r"not written: .* tries again") as caught:
            _, state = record.state_dict(), record.state_dict()
        assert len(caught) == 1
    if harm == "folder lost":
        folder.unlink()
        away.rename(folder)
    assert len(state["unsaved"].splitlines()) == (4 if harm == "full" else 10)
    assert record.failure is not None
    again = resumed(state, folder)
    for going_on in (again, record):
        assert going_on.metrics.to_jsonl() == record.metrics.to_jsonl()
        measured(going_on, 8, 8)
        going_on.save()
        assert going_on.failure is None
        assert len(lines(folder)) == 12


def test_without_a_folder_the_checkpoint_holds_all(tmp_path):
    record = MetricsRecord()
    measured(record, 1, 6)
    state = record.state_dict()
    assert state["num_bytes"] == 0
    again = resumed(state, tmp_path)
    assert again.metrics.to_jsonl() == record.metrics.to_jsonl()
    again.save()
    assert len(lines(tmp_path)) == 9


def test_another_folder_gets_all_and_the_first_is_left_alone(tmp_path):
    first = kept(tmp_path / "first")
    measured(first, 1, 4)
    state = first.state_dict()
    before = (tmp_path / "first" / "metrics.jsonl").read_bytes()
    second = resumed(state, tmp_path / "second", tmp_path / "first")
    measured(second, 5, 6)
    second.save()
    assert len(lines(tmp_path / "second")) == 9
    assert (tmp_path / "first" / "metrics.jsonl").read_bytes() == before
    third = resumed(state, tmp_path / "third")  # the checkpoint knows where it was
    assert third.metrics.to_jsonl().encode() == before
    (tmp_path / "first").rename(tmp_path / "moved")
    with pytest.warns(
        UserWarning, match=r"metrics.jsonl, is not in .*fourth or .*first: .* will not be judged as proved"
    ):
        fourth = resumed(state, tmp_path / "fourth")
    assert fourth.metrics.steps == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-20], "has 735 bytes, expected at least 755"),
        (lambda content: content[content.index(b"\n") + 1 :], "expected at least"),
        (lambda content: b"", "has 0 bytes"),
        (lambda content: content.replace(b"5.0", b"5.1", 1), "is not as it was"),
        (lambda content: content[::-1], "is not as it was"),
    ],
)
def test_a_record_that_was_shortened_or_edited_is_refused(tmp_path, change, message):
    record = kept(tmp_path)
    measured(record, 1, 4)
    state = record.state_dict()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(change(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as caught:
        resumed(state, tmp_path)
    assert "Restore the file, or move it out of the folder" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"num_bytes": None}, {"num_bytes": True}, {"num_bytes": -1}, {"sha256": 1}, {"unsaved": []}, {"unsaved": "{}\n"}],
)
def test_a_state_that_is_none_is_refused(tmp_path, change):
    record = kept(tmp_path)
    measured(record, 1, 2)
    state = {**record.state_dict(), **change}
    with pytest.raises(ValueError, match=r"record|metrics"):
        resumed(state, tmp_path)
