"""What people write as a conversation, brought into one form; whatever cannot be is named."""

from __future__ import annotations

import json
from json import dumps

import pytest

from lit_lora.data.prepared.prepare import SourceSettings, read_examples

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def read(tmp_path, *rows, **options):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(dumps(row) + "\n" for row in rows))
    return read_examples(str(path), SourceSettings(**options))


def assistant(**keys):
    return {"role": "assistant", "content": "", **keys}


CALLING = assistant(tool_calls=[CALL])
TURNS = {
    "consecutive turns of one role": ([USER, USER, ASSISTANT, ASSISTANT], [USER, USER, ASSISTANT, ASSISTANT]),
    "a system message in the middle": (
        [USER, ASSISTANT, {"role": "system", "content": "s"}, USER, ASSISTANT],
        [USER, ASSISTANT, {"role": "system", "content": "s"}, USER, ASSISTANT],
    ),
    "a developer": ([{"role": "developer", "content": "d"}, USER, ASSISTANT],) * 2,
    "text in parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, ASSISTANT],
        [{"role": "user", "content": "a b"}, ASSISTANT],
    ),
    "null keys, as Parquet has them": ([USER | {"tool_calls": None, "name": None}, ASSISTANT], [USER, ASSISTANT]),
    "keys of two kinds": (
        [{"from": "u", **USER}, {"value": "v", **ASSISTANT}],
        [{"from": "u", **USER}, {"value": "v", **ASSISTANT}],
    ),
    "other keys": ([USER | {"name": "Ann"}, ASSISTANT], [USER | {"name": "Ann"}, ASSISTANT]),
    "a tool call without content": ([USER, {"role": "assistant", "tool_calls": [CALL]}], [USER, CALLING]),
    "a tool call with null content": ([USER, assistant(content=None, tool_calls=[CALL])], [USER, CALLING]),
    "a tool call without its wrapping": (
        [USER, assistant(tool_calls=[{"name": "f", "arguments": {"x": 1}}])],
        [USER, assistant(tool_calls=[CALL])],
    ),
    "arguments as JSON": (
        [USER, assistant(tool_calls=[{"id": "7", "function": {"name": "f", "arguments": '{"x": 1}'}}])],
        [USER, assistant(tool_calls=[CALL | {"id": "7", "function": {"name": "f", "arguments": '{"x": 1}'}}])],
    ),
    "a function call of old": (
        [USER, assistant(function_call=CALL["function"]), {"role": "function", "content": "1", "name": "f"}],
        [USER, CALLING, {"role": "tool", "content": "1", "name": "f"}],
    ),
    "a tool's empty result": ([USER, assistant(tool_calls=[CALL]), {"role": "tool", "content": ""}],) * 2,
    "a tool's result as an object": (
        [USER, assistant(tool_calls=[CALL]), {"role": "tool", "content": {"é": 1}}],
        [USER, assistant(tool_calls=[CALL]), {"role": "tool", "content": '{"é": 1}'}],
    ),
    "reasoning": (
        [USER, assistant(content="a", thinking="t")],
        [USER, assistant(content="a", reasoning_content="t")],
    ),
    "an empty reasoning": ([USER, assistant(content="a", reasoning_content="")], [USER, ASSISTANT]),
    "train: false": ([USER, ASSISTANT | {"train": False}, USER, ASSISTANT | {"train": True}],
                     [USER, ASSISTANT | {"weight": 0.0}, USER, ASSISTANT]),
    "a weight": ([USER, ASSISTANT | {"weight": 0.5}], [USER, ASSISTANT | {"weight": 0.5}]),
    "a weight as an integer": ([USER, ASSISTANT | {"weight": 1}], [USER, ASSISTANT]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TURNS)
def test_turns_are_brought_into_one_form(tmp_path, kind) -> None:
    given, expected = TURNS[kind]
    assert read(tmp_path, {"messages": given}).items[0].content == expected


def test_sharegpt_has_tool_calls_and_results_as_turns(tmp_path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "u"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([TOOL["function"]]),
        "system": "s",
    }
    (example,) = read(tmp_path, row).items
    assert [turn["role"] for turn in example.content] == ["system", "user", "assistant", "tool", "assistant"]
    assert example.content[2]["tool_calls"] == [CALL]
    assert example.tools == [TOOL]
    (other,) = read(tmp_path, {"conversations": [USER, ASSISTANT]}).items
    assert other.content == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, ASSISTANT],
         "the content of turn 1 (user) holds a part of the kind 'image'; only text can be trained on here"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}, ASSISTANT], "a part of the kind 'input_audio'"),
        ([USER, assistant(tool_calls=[{"function": {"arguments": {}}}])],
         "a tool call of turn 2 (assistant) is {'function': {'arguments': {}}}, expected an object with 'name'"),
        ([USER, assistant(tool_calls=[{"name": "f", "arguments": "x=1"}])],
         "the arguments of turn 2 (assistant) is 'x=1', expected JSON"),
        ([USER, assistant(tool_calls=[{"name": "f", "arguments": "[1]"}])],
         "the arguments of a tool call of turn 2 (assistant) are '[1]', expected a JSON object"),
        ([USER, ASSISTANT | {"weight": -1}], "'weight' of turn 2 (assistant) is -1, expected a number that is not"),
        ([USER, ASSISTANT | {"weight": "0.5"}], "'weight' of turn 2 (assistant) is '0.5', expected a number"),
        ([USER, ASSISTANT | {"train": "no"}], "'train' of turn 2 (assistant) is 'no', expected true or false"),
        ([USER, assistant(reasoning_content=[1], content="a")], "the reasoning of turn 2 (assistant) is of type list"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_turn_is_named(tmp_path, turns, message) -> None:
    with pytest.raises(ValueError, match="1 bad rows") as caught:
        read(tmp_path, {"messages": turns})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "none"}, "field 'tools' is 'none', expected JSON"),
        ({"tools": ["f"]}, "field 'tools' is ['f'], expected a list of objects"),
        ({"chat_template_kwargs": [1]}, "field 'chat_template_kwargs' is [1], expected an object of variables"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, USER, ASSISTANT]},
         "field 'system' has a system message, and the conversation begins with another one"),
    ],
)  # fmt: skip
def test_what_cannot_stand_beside_turns_is_named(tmp_path, row, message) -> None:
    with pytest.raises(ValueError, match="1 bad rows") as caught:
        read(tmp_path, {"messages": [USER, ASSISTANT], **row})
    assert message in str(caught.value)


FIELDS = {
    "a context after the prompt": (
        {"instruction": "u", "context": "c", "response": "a"},
        [{"role": "user", "content": "u\n\nc"}, ASSISTANT],
    ),
    "a system column beside turns": ({"system": "s", "messages": [USER, ASSISTANT]},
                                     [{"role": "system", "content": "s"}, USER, ASSISTANT]),
    "turns as prompt and completion": ({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
                                       [USER, ASSISTANT | {"weight": 0.0}, USER, ASSISTANT]),
}  # fmt: skip


def test_what_is_nested_too_deeply_is_named(tmp_path, monkeypatch) -> None:
    row = {"messages": [USER | {"x": [[1]]}, ASSISTANT]}
    monkeypatch.setattr("lit_lora.data.chats.formats.json.dumps", _too_deep)
    with pytest.raises(ValueError, match=r"a.jsonl:1: nested too deeply"):
        read(tmp_path, row)


def _too_deep(*arguments, **options):
    raise RecursionError("maximum recursion depth exceeded")


@pytest.mark.parametrize("kind", FIELDS)
def test_fields_that_were_left_out_are_used(tmp_path, kind) -> None:
    row, expected = FIELDS[kind]
    assert read(tmp_path, row).items[0].content == expected


@pytest.mark.parametrize("name", ["input", "system"])
def test_a_field_that_the_first_row_lacks_is_used_where_it_is(tmp_path, name) -> None:
    row = {"instruction": "u", "output": "a"}
    first, second = read(tmp_path, row, row | {name: "more"}).items
    assert first.content == [USER, ASSISTANT]
    assert "more" in str(second.content)


def test_columns_that_are_not_used_are_counted_or_ignored(tmp_path) -> None:
    rows = [{"prompt": "u", "completion": "a", "id": 1}, {"prompt": "v", "completion": "a", "id": 2, "tag": None}]
    assert read(tmp_path, *rows).problems.notes == {"column 'id' is not used": 2}
    assert not read(tmp_path, *rows, ignore_columns=["id"]).problems.notes


def test_rows_are_equal_only_with_equal_tools(tmp_path) -> None:
    row = {"messages": [USER, ASSISTANT]}
    assert read(tmp_path, row, row | {"tools": [TOOL]}).num_duplicates == 0
    assert read(tmp_path, row | {"tools": [TOOL]}, row | {"tools": [TOOL]}).num_duplicates == 1
