"""From rows to conversations and texts."""

from __future__ import annotations

import json

import pytest

from lit_lora.data.chats.formats import FORMATS, resolve_columns
from lit_lora.data.prepared.prepare import SourceSettings, read_examples

USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}

ROWS = {
    "alpaca": ({"instruction": "u", "input": "", "output": "a"}, [USER, ASSISTANT]),
    "alpaca with input": (
        {"instruction": "u", "input": "more", "output": "a", "system": "s"},
        [SYSTEM, {"role": "user", "content": "u\n\nmore"}, ASSISTANT],
    ),
    "alpaca null input": ({"instruction": "u", "input": None, "output": "a"}, [USER, ASSISTANT]),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [SYSTEM, USER, ASSISTANT],
    ),
    "messages": (
        {"messages": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT], "prompt": "x"},
        [SYSTEM, *[USER, ASSISTANT] * 2],
    ),
    "messages, open end": ({"messages": [USER, ASSISTANT, USER]}, [USER, ASSISTANT, USER]),
    "prompt": ({"prompt": "u", "completion": "a", "id": 3}, [USER, ASSISTANT]),
    "question": ({"question": "u", "answer": "a"}, [USER, ASSISTANT]),
    "text": ({"text": "all of it", "meta": None}, "all of it"),
}


def read(tmp_path, *rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(str(path), SourceSettings(**options))


@pytest.mark.parametrize("name", ROWS)
def test_detected_format(tmp_path, name) -> None:
    row, expected = ROWS[name]
    assert read(tmp_path, row).items[0].content == expected


def test_every_format_is_covered() -> None:
    covered = {resolve_columns(row, "auto", None)[0] for row, _ in ROWS.values()}
    assert covered == set(FORMATS)


def test_columns_rename_fields(tmp_path) -> None:
    row = {"frage": "u", "antwort": "a", "text": "other"}
    examples = read(tmp_path, row, columns={"prompt": "frage", "completion": "antwort"})
    assert (examples.format, examples.items[0].content) == ("prompt_completion", [USER, ASSISTANT])
    examples = read(tmp_path, {"dialog": [USER, ASSISTANT]}, columns={"messages": "dialog"})
    assert examples.items[0].content == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"a": "x"}, {}, r"columns \['a'\] do not fit any format; expected messages \(messages\); sharegpt"),
        ({"a": "x"}, {"format": "alpaca"}, "do not fit the format 'alpaca'; expected alpaca .instruction, output"),
        ({"a": "x"}, {"format": "alpacca"}, "format 'alpacca' is unknown"),
        ({"question": "x"}, {"columns": {"prompt": "quesion"}}, "maps 'prompt' to 'quesion'.*did you mean 'question'"),
        ({"text": "x", "b": "y"}, {"columns": {"prompts": "b"}}, "with columns=.'prompts': 'b'. do not fit any format"),
    ],
)
def test_columns_that_fit_nothing(tmp_path, row, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, row, **options)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([USER], "no assistant turn to learn from, got ['user']"),
        ([], "no assistant turn to learn from, got no turns"),
        (
            [USER, {"role": "judge", "content": "x"}],
            "turn 2 has the unknown role 'judge', expected one of ['assistant'",
        ),
        ([USER, {"role": None, "content": "x"}], "turn 2 has the unknown role None"),
        ([USER, {"role": "assistant", "content": None}], "'content' of turn 2 (assistant) is null"),
        ([USER, {"role": "assistant", "content": ""}], "'content' of turn 2 (assistant) is empty"),
        ([USER, {"role": "assistant"}], "turn 2 of 'messages' needs 'role' and 'content', got ['role']"),
        ([USER, "x"], "turn 2 of 'messages' needs 'role' and 'content', got str"),
        (None, "field 'messages' is null, expected a list of turns"),
        ("x", "field 'messages' is str, expected a list of turns"),
    ],
)
def test_bad_conversations_are_named_by_line(tmp_path, turns, message) -> None:
    good = {"messages": [USER, ASSISTANT]}
    with pytest.raises(ValueError, match="1 bad rows") as caught:
        read(tmp_path, good, {"messages": turns})
    assert f"a.jsonl:2: {message}" in str(caught.value)
    assert len(read(tmp_path, good, {"messages": turns}, on_bad_rows="drop").items) == 1


def test_duplicates_are_counted_and_kept(tmp_path) -> None:
    row = {"prompt": "u", "completion": "a"}
    examples = read(tmp_path, row, row | {"id": 1}, row | {"prompt": "v"}, row)
    assert (len(examples.items), examples.num_duplicates) == (4, 2)


def test_limit_reads_only_the_first_rows(tmp_path) -> None:
    row = {"prompt": "u", "completion": "a"}
    assert len(read(tmp_path, row, row, {"broken": 1}, limit=2).items) == 2
