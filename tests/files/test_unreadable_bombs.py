"""Files made to hang, to fill memory or to flood the screen: refused by name, in a message that can be read.

``make faults`` has a longer table, through the command line and with limits of time and memory.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora.__main__ import MOST_CHARACTERS, main
from lit_lora.base.load import load_tokenizer
from lit_lora.cli.setting_check import refuse
from lit_lora.data.chats.chat_template import run_tokenizer
from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from lit_lora.data.rows import readers
from lit_lora.files import strict_yaml
from lit_lora.files.checkpoint import CHECKSUM, DamagedCheckpointError, newest_checkpoint, read_checkpoint
from lit_lora.metrics import TrainingMetrics
from lit_lora.report.outcome import FILE_NAME, Outcome, read_outcome
from lit_lora.training.training_state import _check_layout, layout

pytestmark = pytest.mark.timeout(60)
READABLE = 5000

NAMES = [f"c{number}" for number in range(30_000)]
PAIRS = ", ".join(f'"{name}": "x"' for name in NAMES)
DATA = [
    ("a.jsonl", '{"%s": 1}' % ("n" * 100_000), "the columns ['nnn"),
    ("a.jsonl", f"{{{PAIRS}}}", "'c19', and 29,980 more] do not fit any format"),
    ("a.jsonl", f'{{"prompt": "a", "completion": "b"}}\n{{{PAIRS}}}', "a.jsonl:2: no field 'prompt', got ['c0'"),
    ("a.jsonl", f'{{{PAIRS}, "c29999": 1}}', "the field 'c29999' is there more than once"),
    ("a.jsonl", '{"messages": [{"role": "%s", "content": "a"}]}' % ("r" * 100_000), "unknown role 'rrr"),
    ("a.jsonl", '{"messages": [{"role": %s, "content": "a"}]}' % ("[" * 900 + "]" * 900), "unknown role [[[["),
    ("a.jsonl", f'{{"messages": [{{{PAIRS}}}]}}', "turn 1 of 'messages' needs 'role' and 'content', got ['c0'"),
    ("a.json", f"{{{PAIRS.replace(', ', ', ' + chr(10))}}}", "is one JSON object with the keys ['c0'"),
    ("a.csv", ",".join(NAMES) + "\n1,2\n", "2 cells, expected 30000 ['c0'"),
    ("a.csv", "prompt,completion," + ",".join(NAMES) + "\n1,2\n", "a.csv:2: 2 cells, expected 30002 ['prompt'"),
    ("a.csv", "prompt," * 30_000 + "\n", "and 'prompt' is there more than once"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), DATA, ids=[message for _, _, message in DATA])
def test_what_is_wrong_with_data_is_told_in_a_few_words(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=name) as caught:
        read_examples(str(path), SourceSettings())
    assert message in str(caught.value)
    assert len(str(caught.value)) < READABLE


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_data_larger_than_memory_is_not_begun(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(1 << 43)  # takes no room on the disk
    with pytest.raises(ValueError, match="has 8,192 GiB and this machine"):
        read_examples(str(path), SourceSettings())


def test_parquet_that_unfolds_beyond_memory_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfold(path: Path, name: str) -> Any:
        raise MemoryError  # as `to_pylist` does of a text that stands there once and counts a thousand times
        yield

    monkeypatch.setattr(readers, "_parquet_blocks", unfold)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet does not fit into memory"):
        read_examples(str(path), SourceSettings())


def _saved(**content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save({"state_dict": {}, CHECKSUM: "x", **content}, path)


def _doubled(kind: Callable[[Any], Any]) -> Any:
    value: Any = [1]
    for _ in range(60):
        value = kind(value)
    return value


def _within_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _compressed(path: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1 << 20)}}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "lists that double": (_saved(x=_doubled(lambda value: [value, value])), "takes far more than"),
    "mappings that double": (_saved(x=_doubled(lambda value: {"a": value, "b": value})), "takes far more than"),
    "a list within itself": (_saved(x=_within_itself()), "nested more than"),
    "a list 200 deep": (_saved(x=_deep(200)), "nested more than"),
    "one number as a tebibyte": (_saved(x=torch.zeros(1).expand(1 << 38)), "takes far more than"),
    "one tensor many times": (_saved(x=[torch.zeros(1000)] * 100_000), "takes far more than"),
    "a tensor without values": (_saved(x=torch.zeros(4, device="meta")), "cannot be read"),
    "compressed zeros": (_compressed, "its parts have 4,19"),
    "weights that are a list": (_saved(state_dict=[1]), "has no state_dict"),
}


@pytest.mark.parametrize(("make", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_stands_for_more_than_it_holds_is_damaged(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "a.ckpt"
    make(path)
    with pytest.raises(DamagedCheckpointError, match=r"a\.ckpt") as caught:
        read_checkpoint(path)
    assert message in str(caught.value)


def test_tied_weights_are_there_twice_and_sound(tmp_path: Path) -> None:
    weight = torch.rand(1000, 1000)
    torch.save({"state_dict": {"embedding": weight, "head": weight}}, tmp_path / "a.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["head"], weight)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_pipe_among_checkpoints_is_passed_over(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "optimizer_states": [], "global_step": 1}, tmp_path / "step=1.ckpt")
    os.mkfifo(tmp_path / "step=2.ckpt")
    newest, problems = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step=1.ckpt"
    assert "step=2.ckpt" in problems[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_config_that_is_a_pipe_nobody_writes_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_yaml, "PIPE_LIMIT_S", 0.1)
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"config\.yaml is a pipe to which nobody writes"):
        strict_yaml.read(tmp_path / "config.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name here")
def test_a_config_that_is_written_to_a_pipe_is_read() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b"data: {train: a}")
    assert strict_yaml.read(Path(f"/dev/fd/{reading}")) == {"data": {"train": "a"}}
    os.close(reading)


def _record(**changes: Any) -> str:
    """A verdict as a run writes it, with changes."""
    sound = {"step": 1, "verdicts": [], "finished": True, "stopped_early": False, "base": "", "changes": [],
             "no_step_left": "", "losses": [], "speed": []}  # fmt: skip
    said = {"result": "not judged", "reasons": ["no check is configured"]}
    return json.dumps({"format": 1, **said, **sound, **changes})


VERDICTS = {
    "deep": "[" * 100_000,
    "a step that is text": _record(step="x"),
    "a step that is infinite": _record(step=float("inf")),
    "losses that are a number": _record(losses=5),
    "losses that are numbers": _record(losses=[5]),
    "changes without settings": _record(changes=[5]),
    "a verdict whose name is a list": _record(verdicts=[{"name": [], "passed": True, "detail": ""}]),
    "a better result than its checks": _record(result="proved"),
    "no result": _record(result=None),
    "larger than any": _record(base="x" * (17 << 20)),
}


@pytest.mark.parametrize("text", VERDICTS.values(), ids=VERDICTS)
def test_a_verdict_that_no_run_has_written_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.warns(UserWarning, match=r"verdict\.json cannot be read, so the run is judged again") as caught:
        assert read_outcome(tmp_path) is None
    assert len(str(caught[0].message)) < READABLE


def test_a_verdict_that_a_run_may_have_written_is_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(_record())
    outcome = read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.result == "not judged"


def test_a_verdict_is_none_where_a_pipe_or_folder_lies(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.warns(UserWarning, match="expected a file"):
        assert read_outcome(tmp_path) is None
    (tmp_path / FILE_NAME).rmdir()
    Outcome(step=1, verdicts=[]).save(tmp_path)
    assert read_outcome(tmp_path) == Outcome(step=1, verdicts=[])


STEP = {"step": 1, "loss": 1.0, "loss_scale": 1.0, "grad_norm": 1.0, "param_norm": 1.0, "learning_rate": 1.0,
        "step_time_s": 1.0, "num_tokens": 1, "num_target_tokens": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**STEP, "learning_rate": "nonsense"}, "hold 'nonsense' for learning_rate, expected a number"),
        ({**STEP, "grad_norm": None}, "hold None for grad_norm"),
        ({**STEP, "loss": None}, "hold None for loss"),
        ({"step": 1, "val_loss": "x"}, "hold 'x' for val_loss"),
        ({"val_loss": 1.0}, "lack step"),
        ({"step": 1}, "missing grad_norm, learning_rate, loss"),
        (1, "missing grad_norm"),
        ([STEP], "missing grad_norm"),
        ("[" * 100_000, "line 4 of the metrics is no JSON object"),
        ("{", "line 4 of the metrics is no JSON object"),
    ],
)
def test_metrics_that_are_no_numbers_are_refused(line: Any, message: str) -> None:
    lines = [STEP, {**STEP, "loss": None, "num_target_tokens": 0}, {"step": 1, "val_loss": 1}]
    sound = "".join(json.dumps(entry) + "\n" for entry in lines)
    assert TrainingMetrics.from_jsonl(sound).steps[0].loss == 1.0
    with pytest.raises(ValueError, match="metrics") as caught:
        TrainingMetrics.from_jsonl(sound + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    assert message in str(caught.value)


def _tokenizer(folder: Path, **changes: Any) -> str:
    load_tokenizer("bytes").save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


def test_a_tokenizer_whose_expression_takes_too_long_is_named(tmp_path: Path) -> None:
    slow = {"type": "Split", "pattern": {"Regex": "((a|a)+)+b"}, "behavior": "Isolated", "invert": False}
    tokenizer = load_tokenizer(_tokenizer(tmp_path / "slow", pre_tokenizer=slow))
    with pytest.raises(ValueError, match=r"the tokenizer \S+slow fails on the text: Onig"):
        run_tokenizer(tokenizer, "a" * 50)


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a*"}])
def test_a_tokenizer_that_doubles_over_and_over_is_refused(tmp_path: Path, pattern: dict[str, str]) -> None:
    doubling = {"type": "Replace", "pattern": pattern, "content": "aa"}
    sequence = {"type": "Sequence", "normalizers": [doubling, {"type": "NFC"}] * 40}
    with pytest.raises(ValueError, match="would make up to"):
        load_tokenizer(_tokenizer(tmp_path / "growing", normalizer=sequence))


def test_a_tokenizer_that_replaces_is_read(tmp_path: Path) -> None:
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    quotes = {"type": "Replace", "pattern": {"Regex": "``|''"}, "content": '"'}
    normalizer = {"type": "Sequence", "normalizers": [quotes, spaces, {"type": "Prepend", "prepend": "▁"}]}
    load_tokenizer(_tokenizer(tmp_path / "replacing", normalizer=normalizer))


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda saved: saved["loops"]["progress"]["current"].pop("started"), "loops.progress.current.started"),
        (lambda saved: saved["loops"].pop("progress"), "loops.progress and 3 more"),
        (lambda saved: saved.update(loops=None), "loops.progress and 3 more"),
        (lambda saved: saved.pop("SFTDataModule"), "SFTDataModule and 1 more"),
        (lambda saved: saved["lr_schedulers"][0].pop("last_epoch"), "lr_schedulers.0.last_epoch"),
        (lambda saved: saved["callbacks"]["X"].pop("losses"), "callbacks.X.losses and 1 more"),
        (lambda saved: saved["callbacks"].update({"Y": saved["callbacks"].pop("X")}), "callbacks.X and 2 more"),
    ],
)
def test_what_was_saved_and_is_gone_is_named(change: Callable[[Any], object], missing: str) -> None:
    saved: dict[str, Any] = {
        "loops": {"progress": {"current": {"ready": 1, "started": 1}}},
        "SFTDataModule": {"epoch": 1},
        "lr_schedulers": [{"last_epoch": 3}],
        "callbacks": {"X": {"losses": {"1": 0.5}}},
        "state_dict": {"weight": 1},
    }
    saved["lit_lora"] = {"layout": layout(saved)}
    _check_layout(saved)
    assert not any("weight" in name for name in saved["lit_lora"]["layout"])
    change(saved)
    with pytest.raises(ValueError, match=f"lacks {re.escape(missing)}, which was saved"):
        _check_layout(saved)


def test_many_problems_and_long_ones_are_cut(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refuse([f"x.yaml: no setting 'k{number}'" for number in range(9000)])
    told = capsys.readouterr().err
    assert "9000 problems" in told
    assert "... and 8,960 more" in told
    assert len(told) < READABLE
    with pytest.raises(SystemExit):
        refuse(["x" * 1_000_000])
    assert len(capsys.readouterr().err) < READABLE


def test_an_error_of_any_length_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    name = "x/" * MOST_CHARACTERS
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--adapter", name])
    told = capsys.readouterr().err
    assert "more characters)" in told
    assert len(told) < MOST_CHARACTERS + 200
