"""Preference pairs: shown, not trained on; and their chosen answers trained on as the message says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_lora import SFTDataModule, inspect_data
from lit_lora.__main__ import main
from lit_lora.data.chats.pairs import is_pair
from tests.tiny import config

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

USER = {"role": "user", "content": "2 + 2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5, I think"}
SYSTEM = {"role": "system", "content": "Be short."}
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
PROMPT, CHOSEN, REJECTED = "<bos>user:\n2 + 2?<eos>\nassistant:\n", "4<eos>", "5, I think<eos>"
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}

PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "explicit text": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5, I think"}, PROMPT),
    "question": ({"question": "2 + 2?", "chosen": "4", "rejected": "5, I think"}, PROMPT),
    "explicit text with a system message": (
        {"system": "Be short.", "prompt": "2 + 2?", "chosen": "4", "rejected": "5, I think"},
        PROMPT.replace("<bos>", "<bos>system:\nBe short.<eos>\n"),
    ),
    "instruction and input": (
        {"instruction": "Add.", "input": "2 + 2", "chosen": "4", "rejected": "5, I think"},
        "<bos>user:\nAdd.\n\n2 + 2<eos>\nassistant:\n",
    ),
    "explicit turns": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PROMPT),
    "explicit turns with a system message": (
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
        PROMPT.replace("<bos>", "<bos>system:\nBe short.<eos>\n"),
    ),
    "text, then turns": ({"prompt": "2 + 2?", "chosen": [GOOD], "rejected": [BAD]}, PROMPT),
    "implicit turns": ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PROMPT),
    "implicit turns beside a prompt": (
        {"prompt": "2 + 2?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        PROMPT,
    ),
    "several turns": (
        {"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
        "<bos>user:\nhi<eos>\nassistant:\nhello<eos>\n" + PROMPT.removeprefix("<bos>"),
    ),
    "ShareGPT": (
        {
            "chosen": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}],
            "rejected": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "5, I think"}],
        },
        PROMPT,
    ),
    "implicit text": ({"chosen": "2 + 2? 4", "rejected": "2 + 2? 5, I think"}, "2 + 2? "),
}
"""Row -> what both answers begin with."""

SHAREGPT_PROMPT = {
    "conversations": [{"from": "human", "value": "2 + 2?"}],
    "chosen": {"from": "gpt", "value": "4"},
    "rejected": {"from": "gpt", "value": "5, I think"},
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config("Llama", vocab_size=260).to_json_file("tiny.json")

    def write(*rows: dict[str, Any]) -> str:
        Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return "pairs.jsonl"

    return write


def shown(name: str, **options: Any) -> dict[str, str]:
    (example,) = inspect_data(name, "random:tiny.json", tokenizer="bytes", **options).examples
    return {part: "".join(piece.text for piece in pieces) for part, pieces in example.parts.items()}


def fit(*arguments: str) -> None:
    settings = {
        "model.base": "random:tiny.json", "data.train": "pairs.jsonl", "data.tokenizer": "bytes", "data.cache_dir": "c",
        "trainer.max_steps": 1, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
        "convergence.min_decrease": 0.0,
    }  # fmt: skip
    main(["fit", *(f"--{name}={value}" for name, value in settings.items()), *arguments])


@pytest.mark.parametrize(("row", "prompt"), [*PAIRS.values(), (SHAREGPT_PROMPT, PROMPT)], ids=[*PAIRS, "with prompt"])
def test_both_answers_are_shown_with_their_prompt(written, row, prompt) -> None:
    assert shown(written(row)) == {"prompt": prompt, "chosen": CHOSEN, "rejected": REJECTED}


@pytest.mark.parametrize(("row", "prompt"), PAIRS.values(), ids=PAIRS)
def test_training_refuses_them_and_says_how_to_train_on_the_chosen_ones(written, row, prompt) -> None:
    """In Python: the argument that the message names is the one that works."""
    name = written(row)
    with pytest.raises(ValueError, match="these are preference pairs") as refused:
        SFTDataModule(name, tokenizer="bytes", cache_dir="c").setup("fit")
    columns = re.search(r"alone, set columns=(\{.*?\})", str(refused.value))
    assert columns
    data = SFTDataModule(name, tokenizer="bytes", cache_dir="c", columns=json.loads(columns[1].replace("'", '"')))
    data.setup("fit")
    assert data.tokenizer.decode(data.train_data[0].ids) == prompt + CHOSEN


def test_what_no_setting_can_do_is_said(written) -> None:
    with pytest.raises(ValueError, match="write the chosen ones to a file of their own; lit-lora data shows both"):
        SFTDataModule(written(SHAREGPT_PROMPT), tokenizer="bytes", cache_dir="c").setup("fit")


def test_the_command_line_says_what_to_add_to_it(written, capfd) -> None:
    written(PAIRS["explicit turns"][0])
    with pytest.raises(SystemExit) as ended:
        fit()
    assert ended.value.code == 1
    error = capfd.readouterr().err
    advised = re.search(r"alone, set (--data.columns '.*?')", error)
    assert advised
    fit(*shlex.split(advised[1]))
    assert "  | 〕4<eos>■" in capfd.readouterr().err


def test_settings_that_say_what_to_take_are_followed(written) -> None:
    row = PAIRS["implicit turns beside a prompt"][0]
    data = SFTDataModule(written(row), tokenizer="bytes", cache_dir="c", format="messages")
    data.setup("fit")
    assert data.summary.statistics.notes["column 'rejected' is not used"] == 1


@pytest.mark.parametrize(
    ("format", "columns", "expected"),
    [
        ("auto", None, True),
        ("messages", None, False),
        ("auto", {"prompt": "prompt", "completion": "chosen"}, False),
        ("auto", {"prompt": "rejected"}, False),
        ("auto", {"chosen": "rejected", "rejected": "chosen"}, True),
        ("auto", {"chosen": "nowhere"}, False),
    ],
)
def test_only_rows_left_to_us_are_pairs(format, columns, expected) -> None:
    assert is_pair({"prompt": "a", "chosen": "b", "rejected": "c"}, format, columns) is expected


def test_columns_of_other_names(written) -> None:
    name = written({"asked": "2 + 2?", "better": "4", "worse": "5, I think"})
    columns = {"prompt": "asked", "chosen": "better", "rejected": "worse"}
    assert shown(name, columns=columns) == {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}


def test_bad_pairs_and_further_columns_are_told(written) -> None:
    good = PAIRS["explicit text"][0]
    rows = [
        good | {"score_chosen": 9.0, "score_rejected": 1.0},
        good | {"rejected": "4"},
        good | {"chosen": ""},
        good | {"chosen": "", "rejected": ""},
        {"prompt": "a", "chosen": "b"},
        {"prompt": "longer", "chosen": "longer answer", "rejected": "short"},
    ]
    report = inspect_data(written(*rows), "random:tiny.json", tokenizer="bytes", examples=0)
    (source,) = report.sources
    assert {kind.message: kind.lines["pairs.jsonl"] for kind in source.problems} == {
        "chosen: field 'completion' is empty": (3, 4),
        "chosen and rejected are the same": (2,),
        "no pair: expected both chosen and rejected": (5,),
    }
    assert source.notes == {"column 'score_chosen' is not used": 1, "column 'score_rejected' is not used": 1}
    assert source.pairs is not None
    assert (source.pairs.num_pairs, source.pairs.num_chosen_longer) == (2, 1)
    assert source.pairs.num_prompt_tokens == len("<user:\n2 + 2?>\nassistant:\n<user:\nlonger>\nassistant:\n")
    assert source.pairs.num_chosen_tokens == len("4>longer answer>")
    assert source.pairs.num_rejected_tokens == len("5, I think>short>")
    text = str(report)
    assert "2 pairs: on average" in text
    assert "the chosen answer is the longer one in 50%" in text
    assert "these are preference pairs" in text


def test_pairs_in_an_array_on_one_line_are_told_apart(written) -> None:
    row = PAIRS["explicit text"][0]
    Path("pairs.json").write_text(json.dumps([row, row | {"chosen": "four"}]))
    report = inspect_data("pairs.json", "random:tiny.json", tokenizer="bytes")
    chosen = ["".join(piece.text for piece in example.parts["chosen"]) for example in report.examples]
    assert chosen == ["4<eos>", "four<eos>"]


def test_the_suggested_settings_train_on_the_chosen_ones(written) -> None:
    report = inspect_data(written(PAIRS["implicit turns"][0]), "random:tiny.json", tokenizer="bytes")
    data = SFTDataModule(cache_dir="c", **yaml.safe_load(report.yaml())["data"])
    data.setup("fit")
    assert data.tokenizer.decode(data.train_data[0].ids) == PROMPT + CHOSEN
