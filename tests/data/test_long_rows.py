"""Rows that are too long: cut off, left out, or parted; each is counted."""

from __future__ import annotations

import itertools

import pytest

from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.long_rows import chunks
from lit_lora.data.chats.tokenize import encode_examples
from lit_lora.data.rows.sources import Problems
from tests.chat_tokenizers import chat_tokenizer
from tests.data.test_tokenize import supervised_runs

SYSTEM = {"role": "system", "content": "be brief"}
CHAT = [
    {"role": role, "content": f"{what} {number}"}
    for number in range(8)
    for role, what in (("user", "question"), ("assistant", "answer"))
]


def encode(content, max_length, **settings):
    tokenizer, problems = chat_tokenizer(), Problems("data")
    examples = [Example(1, content), Example(2, CHAT[:2])]
    encoded = encode_examples(tokenizer, examples, problems, max_length=max_length, **settings)
    assert not problems.count
    return tokenizer, encoded, problems


def test_truncate_cuts_off_the_end() -> None:
    _, (long, short), problems = encode(CHAT, 100)
    assert (long.truncated, short.truncated) == (True, False)
    assert len(long.ids) <= 100
    assert not problems.notes


def test_drop_leaves_them_out_and_counts_them() -> None:
    _, encoded, problems = encode(CHAT, 100, long_rows="drop")
    assert [example.line for example in encoded] == [2]
    assert problems.notes == {"longer than max_length: left out": 1}


@pytest.mark.parametrize("max_length", [60, 100, 250])
def test_split_parts_a_conversation_between_exchanges(max_length) -> None:
    tokenizer, encoded, problems = encode([SYSTEM, *CHAT], max_length, long_rows="split")
    parts = [example for example in encoded if example.line == 1]
    assert len(parts) > 1
    assert [example.part for example in parts] == list(range(len(parts)))
    assert all(len(example.ids) <= max_length and not example.truncated for example in parts)
    assert all(tokenizer.decode(example.ids).startswith("<|im_start|>system\nbe brief") for example in parts)
    runs = [run for example in parts for run in supervised_runs(tokenizer, example)]
    assert runs == [f"answer {number}<|im_end|>" for number in range(8)]
    assert problems.notes == {"longer than max_length: split": 1}


def test_split_with_the_last_answer_alone_keeps_the_end_of_the_conversation() -> None:
    tokenizer, encoded, _ = encode([SYSTEM, *CHAT], 100, long_rows="split", train_on_turns="last")
    (long,) = [example for example in encoded if example.line == 1]
    assert supervised_runs(tokenizer, long) == ["answer 7<|im_end|>"]


def test_one_exchange_that_is_too_long_is_truncated() -> None:
    _, (long, _), problems = encode([*CHAT[:1], {"role": "assistant", "content": "a" * 200}], 100, long_rows="split")
    assert long.truncated
    assert not problems.notes


@pytest.mark.parametrize("max_length", [2, 7, 100])
def test_split_text_predicts_every_token_once(max_length) -> None:
    text = "plain text of some length, " * 5
    tokenizer, encoded, problems = encode(text, max_length, long_rows="split")
    parts = [example for example in encoded if example.line == 1]
    assert all(2 <= len(example.ids) <= max_length for example in parts)
    learned = [i for example in parts for i, m in zip(example.ids, example.mask, strict=True) if m]
    assert tokenizer.decode(parts[0].ids[:1] + learned) == text + tokenizer.eos_token
    assert problems.notes["longer than max_length: split"] >= 1


@pytest.mark.parametrize(("count", "max_length"), [(1, 4), (4, 4), (5, 4), (7, 4), (8, 4)])
def test_chunks_overlap_by_one(count, max_length) -> None:
    found = chunks(list(range(count)), max_length)
    assert (found[0][0], found[-1][1]) == (0, count)
    assert all(b[0] == a[1] - 1 for a, b in itertools.pairwise(found))
