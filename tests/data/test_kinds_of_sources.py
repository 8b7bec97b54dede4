"""All that data can be: files of every kind, several of them, datasets, rows in memory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lit_lora.data.datamodule import SFTDataModule
from lit_lora.data.rows import sources
from lit_lora.data.rows.data_source import DataSource
from lit_lora.data.rows.sources import Problems, read_rows

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(5)]


def lines(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def a_file(folder: Path) -> Any:
    (folder / "a.jsonl").write_bytes(lines(ROWS))
    return str(folder / "a.jsonl")


def gzipped(folder: Path) -> Any:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    return str(folder / "a.jsonl.gz")


def gzipped_array(folder: Path) -> Any:
    (folder / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    return str(folder / "a.json.gz")


def zstandard(folder: Path) -> Any:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(folder / "a.jsonl.zst"), "zstd") as file:
        file.write(lines(ROWS))
    return str(folder / "a.jsonl.zst")


def zstandard_csv(folder: Path) -> Any:
    import pyarrow

    text = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    with pyarrow.CompressedOutputStream(str(folder / "a.csv.zst"), "zstd") as file:
        file.write(text.encode())
    return str(folder / "a.csv.zst")


def a_folder(folder: Path) -> Any:
    (folder / "deep").mkdir()
    (folder / "1.jsonl").write_bytes(lines(ROWS[:2]))
    (folder / "2.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[2:3])))
    (folder / "deep" / "3.json").write_text(json.dumps(ROWS[3:]))
    (folder / "README.md").write_text("not data")
    return str(folder)


def a_pattern(folder: Path) -> Any:
    a_folder(folder)
    return f"{folder}/**/*.j*"


def shards(folder: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    for number, part in enumerate((ROWS[:3], ROWS[3:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"part-{number}.parquet")
    return f"{folder}/part-*.parquet"


def saved(folder: Path) -> Any:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


def saved_split(folder: Path) -> Any:
    import datasets

    both = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(both).save_to_disk(folder / "saved")
    return str(folder / "saved")


def a_dataset(folder: Path) -> Any:
    import datasets

    return datasets.Dataset.from_list([*ROWS[::-1], ROWS[0]]).select([4, 3, 2, 1, 0])


def rows(folder: Path) -> Any:
    return ROWS


def an_iterable(folder: Path) -> Any:
    return (row for row in ROWS)


def sources_of_each(folder: Path) -> Any:
    a_folder(folder)
    return [f"{folder}/1.jsonl", {"path": f"{folder}/2.jsonl.gz"}, DataSource(f"{folder}/deep/3.json")]


KINDS = [
    a_file, gzipped, gzipped_array, zstandard, zstandard_csv, a_folder, a_pattern, shards, saved, saved_split,
    a_dataset, rows, an_iterable, sources_of_each,
]  # fmt: skip


def ready(train: Any, folder: Path, **options: Any) -> SFTDataModule:
    data = SFTDataModule(train, **{"tokenizer": "bytes", "cache_dir": folder, **options})
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_examples(tmp_path, kind) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = ready(kind(folder), tmp_path / "cache")
    expected = ready(a_file(tmp_path), tmp_path / "cache")
    assert [data.train_data[i].ids.tolist() for i in range(5)] == [
        expected.train_data[i].ids.tolist() for i in range(5)
    ]
    assert len(data.train_data) == 5
    assert [prompt["reference"] for prompt in next(iter(data.predict_dataloader()))] == [
        row["completion"] for row in ROWS
    ]


def test_the_same_content_under_another_name_is_in_the_cache(tmp_path, monkeypatch) -> None:
    ready(a_file(tmp_path), tmp_path / "cache")
    (tmp_path / "other").mkdir()
    other = a_file(tmp_path / "other")
    monkeypatch.setattr("lit_lora.data.prepared.encoding.encode_examples", None)
    data = ready(other, tmp_path / "cache")
    assert data.train_data.statistics.source == other, "under its own name"


def test_examples_of_several_files_say_which_file_they_are_from(tmp_path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = ready(a_folder(folder), tmp_path / "cache")
    names = ["1.jsonl, line 1", "1.jsonl, line 2", "2.jsonl.gz, line 1", "deep/3.json, line 1", "deep/3.json, line 1"]
    assert data.source_lines([*range(5), -1]) == [*(f"{folder}/{name}" for name in names), -1]


def test_bad_rows_of_several_files_are_named_by_file_and_line(tmp_path) -> None:
    (tmp_path / "1.jsonl").write_bytes(lines(ROWS[:1]) + b"nonsense\n")
    (tmp_path / "2.jsonl").write_bytes(lines([ROWS[0], {"prompt": "p"}]))
    with pytest.raises(ValueError, match="2 bad rows \\(2 are good\\)") as caught:
        ready(f"{tmp_path}/*.jsonl", tmp_path / "cache")
    report = str(caught.value).splitlines()
    assert report[1].startswith(f"  {tmp_path}/1.jsonl:2: not valid JSON")
    assert report[2].startswith(f"  {tmp_path}/2.jsonl:2: no field 'completion'")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "train is empty"),
        ([1, 2], r"row 1 of the list in memory is 1, expected a dict"),
        ([{"prompt": "p", "completion": b"c"}], "row 1 of the list in memory: .* give text, numbers and lists"),
        (5, "train is 5, expected a file, a dataset, rows, or a list of sources"),
        ([{"path": "a.jsonl", "name": "x"}, {"path": "b.jsonl", "name": "x"}], "several sources are called 'x'"),
        ([{"path": "a.jsonl", "name": " "}], "name of the source a.jsonl is empty"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, given, told) -> None:
    with pytest.raises(ValueError, match=told):
        ready(given, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl.gz", b"no gzip", "not a readable gzip file"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:-9], "not a readable gzip file"),
        ("a.jsonl.zst", b"no zstd at all", "not a readable Zstandard file"),
        ("a.parquet.gz", b"x", "Parquet is compressed inside"),
        ("a.txt.gz", b"x", "expected one of .json"),
    ],
)
def test_a_broken_compressed_file_is_refused(tmp_path, name, content, told) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=told):
        list(read_rows(str(tmp_path / name), Problems("")))


def test_a_pattern_without_a_match_says_what_is_there(tmp_path) -> None:
    a_file(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no data file matches .*b\*\.jsonl.*a\.jsonl"):
        list(read_rows(f"{tmp_path}/b*.jsonl", Problems("")))


def test_a_split_that_was_not_saved_is_named(tmp_path) -> None:
    saved_split(tmp_path)
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\]|Unknown split|no_such"):
        sources.source_digest(f"{tmp_path / 'saved'}@no_such")
