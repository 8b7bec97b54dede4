"""Reading files strictly: every broken line is named, nothing is guessed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from lit_lora.data.rows import readers, sources
from lit_lora.data.rows.sources import Problems, is_file_source, read_rows

GOOD = {"prompt": "p", "completion": "c"}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def rows_of(source: str) -> tuple[list[sources.Row], Problems]:
    problems = Problems(source)
    return list(read_rows(source, problems)), problems


def test_jsonl_rows_carry_line_numbers(tmp_path) -> None:
    text = "\ufeff" + json.dumps({"a": "é\u2028x"}, ensure_ascii=False) + "\r\n\n" + json.dumps({"a": 2}) + "\n"
    rows, problems = rows_of(write(tmp_path / "a.jsonl", text))
    assert rows == [(1, {"a": "é\u2028x"}), (3, {"a": 2})]
    assert problems.count == 0


def test_json_array_rows_carry_line_numbers(tmp_path) -> None:
    rows, _ = rows_of(write(tmp_path / "a.json", '[\n {"a": 1},\n {"a":\n  2}, {"a": 3}\n]\n'))
    assert rows == [(2, {"a": 1}), (3, {"a": 2}), (4, {"a": 3})]
    assert rows_of(write(tmp_path / "b.json", "[]"))[0] == []


def test_json_file_with_lines(tmp_path) -> None:
    assert rows_of(write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n'))[0] == [(1, {"a": 1}), (2, {"a": 2})]


def test_csv_rows(tmp_path) -> None:
    text = 'prompt,completion\n"two\nlines",c\n\nx\u2028y,d\n'
    rows, _ = rows_of(write(tmp_path / "a.csv", text))
    assert rows == [(3, {"prompt": "two\nlines", "completion": "c"}), (5, {"prompt": "x\u2028y", "completion": "d"})]


def test_parquet_rows(tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p", "q"], "turns": [["a"], None]}), tmp_path / "a.parquet")
    rows, _ = rows_of(str(tmp_path / "a.parquet"))
    assert rows == [(1, {"prompt": "p", "turns": ["a"]}), (2, {"prompt": "q", "turns": None})]


def test_every_broken_line_is_reported(tmp_path) -> None:
    lines = [
        json.dumps(GOOD).encode(),
        b'{"prompt": "p"',
        b"[1]",
        b'{"prompt": "\xff", "completion": "c"}',
        b'{"prompt": null, "completion": "c"}',
        b'{"prompt": "p"}',
        b'{"prompt": "p", "completion": "  "}',
        b'{"prompt": 3, "completion": "c"}',
        b'{"prompt": "\\ud800", "completion": "c"}',
    ]
    source = write(tmp_path / "a.jsonl", b"\n".join(lines))
    with pytest.raises(ValueError, match="8 bad rows \\(1 are good\\)") as caught:
        read_examples(source, SourceSettings())
    message = str(caught.value)
    assert "on_bad_rows='drop'" in message
    for line, expected in {
        2: "not valid JSON: Expecting ',' delimiter at column",
        3: "a JSON list, expected an object",
        4: "not UTF-8 (byte 0xff at position 12)",
        5: "field 'prompt' is null",
        6: "no field 'completion', got ['prompt']",
        7: "field 'completion' is empty",
        8: "field 'prompt' is of type int, expected text",
        9: "field 'prompt' holds half a surrogate pair",
    }.items():
        assert f"a.jsonl:{line}: {expected}" in message
    kept = read_examples(source, SourceSettings(on_bad_rows="drop"))
    assert [example.line for example in kept.items] == [1]
    assert kept.problems.count == 8


def test_report_shows_ten_and_counts_the_rest(tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", json.dumps(GOOD) + "\n" + "x\n" * 25)
    with pytest.raises(ValueError, match="25 bad rows") as caught:
        read_examples(source, SourceSettings())
    assert str(caught.value).count("not valid JSON") == 10
    assert "... and 15 more" in str(caught.value)


def test_all_rows_bad_is_an_error_even_when_dropping(tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", "x\ny\n")
    with pytest.raises(ValueError, match=r"holds no examples.*all 2 rows are bad"):
        read_examples(source, SourceSettings(on_bad_rows="drop"))


def test_huge_lines_are_reported_without_being_held(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 2**20)
    huge = json.dumps({"prompt": "x" * (3 * 2**20), "completion": "c"})
    exact = json.dumps({"prompt": "p", "completion": ""})
    exact = json.dumps({"prompt": "p", "completion": "c" * (2**20 - len(exact))})
    assert len(exact) == 2**20
    source = write(tmp_path / "a.jsonl", f"{huge}\n{exact}\n{huge}")
    rows, problems = rows_of(source)
    assert [row.line for row in rows] == [2]
    assert problems.shown == [f"{source}:{line}: line of 3.0 MiB, expected at most 1 MiB" for line in (1, 3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"\n\n", "holds no examples"),
        ("a.json", b'[{"text": "x"},\n{"a": }]', "a.json:2: not valid JSON: Expecting value at column 7"),
        ("a.json", b'[{"text": "x"}\n{"a": 2}]', "a.json:2: not valid JSON: expected ',' or ']'"),
        ("a.json", b'{\n"data": [],\n"version": 1}', "is one JSON object with the keys ['data', 'version']"),
        ("a.json", b'[{"text": "x"}', "not valid JSON: expected ',' or ']'"),
        ("a.json", b'[{"prompt": "p", "completion": "c"}] x', "text after the end of the array"),
        ("a.json", b'[\n"\xff"]', "a.json:2: not UTF-8"),
        ("a.csv", b"a,a\n1,2\n", "a.csv:1: the header"),
        ("a.csv", b'a,b\n"1,2\n', "a.csv:2: not valid CSV"),
        ("a.csv", b"prompt,completion\np\n", "a.csv:2: 1 cells, expected 2"),
        ("a.csv", b"a,b\n1,\xe9\n", "a.csv:2: not UTF-8"),
        ("a.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("a.txt", b"text", "ends in '.txt', expected one of .json"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=r".") as caught:
        read_examples(source, SourceSettings())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("trian.jsonl", "did you mean .*train.jsonl"),
        ("train.json", "did you mean .*train.jsonl"),
        ("zzzzz.csv", "holds train.jsonl"),
        ("no/such/train.jsonl", "does not exist"),
    ],
)
def test_missing_file_suggests_its_neighbours(tmp_path, asked, hint) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(FileNotFoundError, match=hint):
        list(read_rows(str(tmp_path / asked), Problems("")))


@pytest.mark.parametrize("name", ["openai/gsm8k", "gsm8k", "openai/gsm8k:main@train[:10%]", "a-b/c.d@test"])
def test_hub_names_are_told_from_files(name) -> None:
    assert not is_file_source(name)


@pytest.mark.parametrize("name", ["train.jsonl", "./data", "a/b/c", "/data/x", "x.csv", "tests/train"])
def test_file_names_are_told_from_the_hub(name) -> None:
    assert is_file_source(name)


def test_starting_on_a_local_file_imports_neither_datasets_nor_pandas(tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", json.dumps(GOOD))
    code = f"""
import sys
from lit_lora.data.datamodule import SFTDataModule
data = SFTDataModule({source!r}, tokenizer="bytes", cache_dir={str(tmp_path)!r})
data.setup("fit"); next(iter(data.train_dataloader()))
assert not {{"datasets", "pandas", "pyarrow", "peft", "bitsandbytes"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["good", "broken", "blank", "list", "bytes"]), min_size=1, max_size=30))
def test_the_report_names_exactly_the_broken_lines(tmp_path_factory, kinds) -> None:
    content = {"good": json.dumps(GOOD).encode(), "broken": b'{"a":', "blank": b"", "list": b"[]", "bytes": b'"\xc3("'}
    source = write(tmp_path_factory.mktemp("h") / "a.jsonl", b"\n".join(content[kind] for kind in kinds) + b"\n")
    rows, problems = rows_of(source)
    broken = [line for line, kind in enumerate(kinds, start=1) if kind in ("broken", "list", "bytes")]
    assert [row.line for row in rows] == [line for line, kind in enumerate(kinds, start=1) if kind == "good"]
    assert problems.count == len(broken)
    assert [int(shown.split(":")[1]) for shown in problems.shown] == broken[:10]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_give_rows_or_a_report(tmp_path_factory, content) -> None:
    folder = tmp_path_factory.mktemp("h")
    for name in ("a.jsonl", "a.json", "a.csv"):
        source = write(folder / name, content)
        try:
            rows_of(source)
        except ValueError as error:
            report = str(error)
        else:
            report = source
        assert source in report


def test_folder_and_split_through_datasets(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", json.dumps(GOOD) + "\n")
    write(folder / "test.jsonl", json.dumps(GOOD | {"prompt": "t"}) + "\n")
    assert rows_of(str(folder))[0] == [(1, GOOD)]
    assert rows_of(f"{folder}@test")[0] == [(1, GOOD | {"prompt": "t"})]
    assert len(sources.source_digest(str(folder))) == 64


def test_unknown_hub_name_says_what_is_expected(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a file nor a dataset that can be loaded"):
        rows_of("no-such-owner/no-such-name")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"prompt": "a", "prompt": "c", "completion": "b"}', "the field 'prompt' is there more than once"),
        ('{"messages": [{"role": "user", "role": "x", "content": "y"}]}', "the field 'role' is there more than once"),
        ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "an integer of more than 4300 digits"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON: nested too deeply"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
    ],
)
def test_json_that_json_takes_in_silence_or_chokes_on_is_reported(tmp_path, row, told) -> None:
    rows, problems = rows_of(write(tmp_path / "a.jsonl", f"{row}\n{json.dumps(GOOD)}\n"))
    assert [row.line for row in rows] == [2]
    assert problems.shown == [f"{tmp_path / 'a.jsonl'}:1: {told}"]
    with pytest.raises(ValueError, match=rf"a\.json:2: {told}; what follows cannot be read"):
        rows_of(write(tmp_path / "a.json", f"[{json.dumps(GOOD)},\n{row}]"))
