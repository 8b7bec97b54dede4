"""What a run says of its data before it trains on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_lora import SFTDataModule
from tests.chat_tokenizers import KINDS, chat_tokenizer

ROWS = [{"prompt": f"say {i}", "completion": f"it is {i}"} for i in range(3)]


def summary(tmp_path: Path, *rows: object, **settings: object) -> str:
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SFTDataModule(str(path), cache_dir=tmp_path / "cache", **{"tokenizer": "bytes", **settings})
    data.setup("fit")
    return str(data.summary)


@pytest.mark.parametrize(
    ("kind", "end"),
    [("ChatML", "<|im_end|>"), ("end of sequence", "<|endoftext|>"), ("no template", "<|endoftext|>")],
)
def test_it_names_the_end_of_an_answer_that_is_supervised(tmp_path, kind, end) -> None:
    text = summary(tmp_path, *ROWS, tokenizer=chat_tokenizer(KINDS[kind].template, **KINDS[kind].options))
    assert f"  supervised end of an answer: {end} (in 3 of 3)\n" in text
    assert f"it is 0{end}■" in text


def test_answers_that_have_lost_their_end_are_not_counted(tmp_path) -> None:
    long = {"prompt": "say 3", "completion": "it is " + "x" * 100}
    assert "<eos> (in 3 of 4)" in summary(tmp_path, *ROWS, long, max_length=60)
    assert "supervised end of an answer: no token for it" in summary(tmp_path, long, max_length=60)


def test_weights_are_shown(tmp_path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0.25}]
    assert "〔×0.25 a〕" in summary(tmp_path, {"messages": turns})
