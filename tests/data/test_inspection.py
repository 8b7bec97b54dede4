"""What is reported of data is what training makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_lora import DataReport, SFTDataModule, inspect_data
from lit_lora.data.look.pieces import Piece, as_text, pieces_of, visible
from lit_lora.data.look.suggestion import suggest
from lit_lora.data.rows.data_source import DataSource
from lit_lora.files import strict_yaml
from tests.chat_tokenizers import chat_tokenizer
from tests.tiny import config

REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ '...' }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that leaves out all answers but the last."""

ROWS = [{"prompt": f"say {i}", "completion": "it is " + "x" * (i * i % 150)} for i in range(60)]
EXAMPLE = re.compile(r"^  \| .*$", re.MULTILINE)
COLOURS = re.compile(r"\033\[\d+m")


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataReport]:
    """Write rows and look at them."""
    monkeypatch.chdir(tmp_path)
    config("Llama", vocab_size=260, max_position_embeddings=4096).to_json_file("tiny.json")

    def looked(*rows: Any, name: str = "my.jsonl", **options: Any) -> DataReport:
        Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return inspect_data(name, "random:tiny.json", **{"tokenizer": "bytes", **options})

    return looked


def trained(name: Any = "my.jsonl", **settings: Any) -> SFTDataModule:
    data = SFTDataModule(name, cache_dir="cache", **{"tokenizer": "bytes", **settings})
    data.setup("fit")
    return data


def test_counts_are_those_of_training(look) -> None:
    report = look(*ROWS)
    data = trained(max_length=4096)
    (source,) = report.sources
    assert (source.num_examples, source.num_tokens) == (len(data.train_data), len(data.train_data.ids))
    assert source.num_supervised == data.summary.num_supervised
    assert report.ends == {"<eos>": 60}
    assert report.num_open == 0
    lengths = data.train_data.lengths
    found = report.lengths
    assert (found.shortest, found.longest) == (lengths.min(), lengths.max())
    assert [entry.count for entry in found.bins] == [
        int(((lengths >= entry.shortest) & (lengths <= entry.longest)).sum()) for entry in found.bins
    ]
    assert sum(entry.count for entry in found.bins) == 60


@pytest.mark.parametrize("long_rows", ["truncate", "drop"])
def test_what_max_length_would_cut_is_what_it_cuts(look, long_rows) -> None:
    rows = [*ROWS, {"prompt": "p" * 300, "completion": "late"}]
    report = look(*rows, long_rows=long_rows, max_length=90)
    whole = trained(max_length=4096).summary.num_supervised
    assert {64, 90, 128, 256} <= {cut.max_length for cut in report.cuts}
    assert [cut.max_length for cut in report.cuts if cut.is_set] == [90]
    for cut in report.cuts:
        data = trained(max_length=cut.max_length, long_rows=long_rows)
        assert whole - data.summary.num_supervised == cut.num_supervised_lost, cut
        assert len(rows) - len(data.train_data) == cut.num_dropped, cut
        if long_rows == "truncate":
            assert data.summary.statistics.num_truncated == cut.num_cut, cut
    assert report.cuts[-1].num_cut == 0


def test_a_large_source_is_looked_at_in_part(look) -> None:
    rows = [*ROWS[:50], *[{"broken": 1}] * 5000]
    part = look(*rows, rows=50)
    assert "looked at the first 50 rows, and there are more" in str(part)
    assert (part.sources[0].num_examples, part.num_problems) == (50, 0)
    whole = look(*ROWS[:50], rows=50)
    assert "looked at all 50 rows" in str(whole)
    assert part.lengths == whole.lengths
    assert look(*rows, rows=None).num_problems == 5000


def test_problems_are_told_by_kind_with_their_lines(look) -> None:
    bad = [{"prompt": "only"}, "no json", {"prompt": "x", "completion": ""}, {"prompt": "other"}, {"completion": "y"}]
    report = look(ROWS[0], *bad, *[{"prompt": 3, "completion": "z"}] * 20, ROWS[1])
    kinds = {kind.message: kind for kind in report.sources[0].problems}
    assert {message: (kind.count, list(kind.lines["my.jsonl"])[:3]) for message, kind in kinds.items()} == {
        "field 'prompt' is of type int, expected text": (20, [7, 8, 9]),
        "no field 'completion', got ['prompt']": (3, [2, 5, 6]),
        "not valid JSON: Expecting value at column 1": (1, [3]),
        "field 'completion' is empty": (1, [4]),
    }
    text = str(report)
    assert "25 rows cannot be used" in text
    assert "my.jsonl:2, 5, 6\n" in text
    assert re.search(r"my.jsonl:7, 8, .* \.\.\.\n", text)
    assert "training refuses data with rows that cannot be used" in text
    assert "refuses" not in str(look(ROWS[0], *bad, on_bad_rows="drop"))


def test_what_is_ignored_is_told(look) -> None:
    turns = [{"role": "user", "content": "u", "mood": "glad"}, {"role": "assistant", "content": "a"}]
    report = look({"messages": turns, "id": 3}, {"messages": turns, "id": None})
    assert report.sources[0].notes == {
        "column 'id' is not used": 1,
        "key 'mood' of a turn is not used by the chat template": 2,
    }
    assert "2 times: key 'mood' of a turn is not used" in str(report)
    assert look({"messages": turns, "id": 3}, ignore_columns=["id", "mood"]).sources[0].notes == {}


def test_an_example_is_shown_as_it_counts(look) -> None:
    turns = [
        {"role": "user", "content": "one"}, {"role": "assistant", "content": "half", "weight": 0.5},
        {"role": "user", "content": "two"}, {"role": "assistant", "content": "none", "train": False},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "whole"},
    ]  # fmt: skip
    report = look({"messages": turns})
    text = "".join(line.removeprefix("  | ") for line in EXAMPLE.findall(str(report)))
    assert "assistant:〕〔×0.5 half〕" in text
    assert "assistant:none<eos>user:" in text
    assert text.endswith("〕whole<eos>■")
    assert "〔×weight text〕" in str(report)
    coloured = report.text(colour=True)
    assert COLOURS.search(coloured)
    assert COLOURS.sub("", coloured) == str(report)


def test_a_long_example_is_cut_in_its_middle() -> None:
    tokenizer = chat_tokenizer()
    ids = [ord("a")] * 500 + [ord("b")] * 499 + [tokenizer.eos_token_id]
    pieces = pieces_of(tokenizer, ids, [0.0] * 500 + [1.0] * 500, [tokenizer.eos_token_id], most_tokens=40)
    assert as_text(pieces) == f"〔{'a' * 30}〕 ... 960 tokens ... {'b' * 9}<|endoftext|>■"
    short = pieces_of(tokenizer, ids[490:510], [0.0] * 10 + [1.0] * 10, [])
    assert short == (Piece("a" * 10, 0.0), Piece("b" * 10, 1.0))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext é 漢 👩‍👩‍👧", "plain\n\ttext é 漢 👩‍👩‍👧"),
        ("\033[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\x08", "a\\rb\\x08"),
        ("\u202egnp", "\\u202egnp"),
    ],
)
def test_data_cannot_write_to_the_terminal(text, shown) -> None:
    assert visible(text) == shown


def test_data_cannot_write_to_the_terminal_from_anywhere(look) -> None:
    evil = "\033[2J\u202e"
    report = look(
        {"prompt": f"a{evil}", "completion": f"b{evil}", f"c{evil}": 1}, {"prompt": f"a{evil}", f"x{evil}": 2},
        {"prompt": "a", "completion": [{f"k{evil}": 1}]}, evil, name=f"{evil}.jsonl",
    )  # fmt: skip
    assert "\033" not in str(report)
    assert "\u202e" not in str(report)


MARKUP = "<script>alert(1)</script><img src=x onerror=y>&lt;"


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_data(look) -> None:
    rows = [
        {"prompt": MARKUP, "completion": MARKUP, MARKUP: 1}, {"prompt": MARKUP, f"z{MARKUP}": 2},
        {"messages": [{"role": MARKUP, "content": "x"}]},
    ]  # fmt: skip
    html = look(*rows, name="<b>&my.jsonl").html()
    page = Page(html)
    known = {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "div", "span",
        "pre", "code", "ul", "li", "br",
    }  # fmt: skip
    assert set(page.tags) <= known
    assert {name for name, _ in page.attributes} <= {
        "lang",
        "charset",
        "content",
        "http-equiv",
        "name",
        "class",
        "style",
    }
    assert page.text.count(MARKUP) >= 4
    assert "<b>&my.jsonl:1" in page.text
    assert not re.search(r"url\(|@import|https?:|//", html)


def test_the_page_says_what_the_text_says(look) -> None:
    report = look(*ROWS, {"prompt": "only"}, {"prompt": "a", "completion": "b", "id": 4})
    text = " ".join(Page(report.html()).text.split())
    for said in (
        "column 'id' is not used", "no field 'completion'", "my.jsonl: 61", "it is xxxx", "max_length: ", "<eos>■",
        f"{report.sources[0].num_tokens:,}", f"{report.lengths.longest}",
    ):  # fmt: skip
        assert said in text, said


def test_machines_get_all_of_it(look) -> None:
    report = look(*ROWS, {"prompt": "only"})
    read = json.loads(json.dumps(report.to_dict()))
    assert {field.name for field in dataclasses.fields(report)} <= read.keys()
    assert read["yaml"] == report.yaml()
    assert read["sources"][0]["problems"][0]["lines"] == {"my.jsonl": [61]}
    assert "".join(piece["text"] for piece in read["examples"][1]["parts"][""]).endswith("it is x<eos>")


def test_suggested_settings_are_settings(look) -> None:
    report = look(*ROWS, max_length=77)
    settings = strict_yaml.parse(report.yaml())
    assert settings["model"] == {"base": "random:tiny.json"}
    data = trained(settings["data"].pop("train"), **settings["data"])
    assert data.summary.statistics.num_truncated == 0
    assert data.source_settings.max_length % 64 == 0
    assert data.source_settings.max_length < report.lengths.longest + 64


@pytest.mark.parametrize(
    ("lengths", "context", "expected"),
    [
        ([100] * 50, None, {"max_length": 128, "batch_size": 4}),
        ([100] * 999 + [5000], None, {"max_length": 128, "batch_size": 4}),
        ([100] * 50 + [130] * 50, None, {"max_length": 192, "batch_size": 4}),
        ([100] * 50 + [500] * 5, None, {"max_length": 512, "max_tokens_per_batch": 576}),
        ([3000] * 50, 2048, {"max_length": 2048, "batch_size": 4}),
        ([3], None, {"max_length": 64, "batch_size": 4}),
    ],
)
def test_suggestions_follow_the_lengths(lengths, context, expected) -> None:
    found = {entry.key: entry.value for entry in suggest(np.array(lengths), context=context)}
    assert found == {**expected, "packing": True}


def test_sources_are_told_apart(look) -> None:
    look(*ROWS[:10], name="some.jsonl")
    look({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, name="more.jsonl")
    sources = ["some.jsonl", DataSource("more.jsonl", weight=0.5)]
    report = inspect_data(sources, "random:tiny.json", tokenizer="bytes", examples=20)
    assert [(one.name, one.format, one.num_examples) for one in report.sources] == [
        ("some.jsonl", "prompt_completion", 10), ("more.jsonl", "messages", 1),
    ]  # fmt: skip
    data = trained(sources)
    tokens = [int(data.train_data.lengths[:10].sum()), int(data.train_data.lengths[10])]
    in_epoch = tokens[0] + 10 * tokens[1]
    assert [one.num_tokens for one in report.sources] == tokens
    shares = [one.epoch_share for one in report.sources]
    assert shares == pytest.approx([tokens[0] / in_epoch, 10 * tokens[1] / in_epoch])
    assert [one.num_in_epoch for one in data.summary.sources] == [10, 10]
    assert "more.jsonl (messages): 1 examples" in str(data.summary)
    assert "10 examples in an epoch" in str(data.summary)
    assert "weight 0.5" in str(report)
    assert {example.source for example in report.examples} == {"some.jsonl", "more.jsonl"}
    settings = strict_yaml.parse(report.yaml())["data"]
    assert [one["path"] for one in settings["train"]] == ["some.jsonl", "more.jsonl"]
    assert trained(settings.pop("train"), **settings).summary.num_examples == 11


def test_a_row_that_becomes_several_examples_is_shown_as_such(look) -> None:
    tokenizer = chat_tokenizer(REWRITING)
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    report = look({"messages": turns}, tokenizer=tokenizer)
    assert report.sources[0].num_examples == 2
    assert [example.part for example in report.examples] == [0, 1]
    assert "my.jsonl:1, part 2, " in str(report)
    assert f"tokenizer: {type(tokenizer).__name__}, its own chat template" in str(report)
    assert "tokenizer" not in strict_yaml.parse(report.yaml())["data"]


def test_rows_in_memory_are_looked_at(look) -> None:
    look(*ROWS)
    report = inspect_data(ROWS, "random:tiny.json", tokenizer="bytes", cache_dir="cache", validation=ROWS[:3])
    json.dumps(report.to_dict())
    assert report.sources[0].num_tokens == look(*ROWS).sources[0].num_tokens
    assert "train" not in strict_yaml.parse(report.yaml())["data"]


def test_what_the_model_cannot_take_is_warned_of(look) -> None:
    config("Llama", vocab_size=200, max_position_embeddings=64).to_json_file("small.json")
    look(*ROWS)
    report = inspect_data("my.jsonl", "random:small.json", tokenizer="bytes")
    assert any("token id 258 is outside the model's vocabulary of 200" in warning for warning in report.warnings)
    assert any("more than the 64 tokens that the model takes" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"examples": -1}, ValueError, "examples must be at least 0, got -1"),
        ({"max_length": 1}, ValueError, "max_length must be at least 2 tokens"),
        ({"maxlength": 1}, TypeError, "maxlength"),
        ({"tokenizer": None}, ValueError, "has no tokenizer of its own"),
        ({"format": "alpaca"}, ValueError, "do not fit the format 'alpaca'"),
    ],
)
def test_mistakes_are_told(look, options, error, message) -> None:
    with pytest.raises(error, match=message):
        look(*ROWS, **options)


def test_no_weights_are_loaded(look, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a parameter was made")

    monkeypatch.setattr(torch.nn.Parameter, "__new__", fail)
    assert look(*ROWS).num_problems == 0
