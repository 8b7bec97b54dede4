"""Read rows from JSON, JSONL, CSV and Parquet files and from Hub datasets, strictly.

A broken line must not vanish: every one is named by file and line, all in one report, and decoding is never lenient.
JSON and JSONL are read with the standard library, so that starting on a local file imports neither ``datasets`` nor
pandas.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from lit_lora.files.meant import closest, did_you_mean

MAX_LINE_BYTES = 16 * 2**20
MAX_PROBLEMS_SHOWN = 10
_MAX_NAMES_SHOWN, _MAX_SHOWN = 20, 60
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")


class Row(NamedTuple):
    """One row of a source."""

    line: int
    """Line number in the file, from 1; for Parquet and Hub datasets the row number."""
    fields: dict[str, Any]


@dataclass
class Problems:
    """What is wrong with a source, collected so that one report names all of it."""

    source: str
    """Name of the file or dataset, put before each line number."""
    shown: list[str] = field(default_factory=list)
    """The first problems, ready to print."""
    count: int = 0
    """How many there are in all."""
    most_shown: int = MAX_PROBLEMS_SHOWN
    """How many of them :attr:`shown` holds."""
    notes: Counter[str] = field(default_factory=Counter)
    """What is done with rows that are good but not taken as they are, and how often: a column that is not used, ..."""

    def add(self, line: int, message: str) -> None:
        """Note that the row at ``line`` cannot be used, and why."""
        self.count += 1
        if len(self.shown) < self.most_shown:
            self.shown.append(f"{self.source}:{line}: {message}")

    def note(self, message: str, count: int = 1) -> None:
        """Count what is done with a row; the message does not name it."""
        self.notes[message] += count

    def merge(self, other: Problems) -> None:
        """Add those of later rows of the same source."""
        self.count += other.count
        self.shown = (self.shown + other.shown)[: self.most_shown]
        self.notes += other.notes

    def __str__(self) -> str:
        rest = self.count - len(self.shown)
        return "\n".join([*(f"  {problem}" for problem in self.shown), *([f"  ... and {rest} more"] if rest else [])])


def shown(value: Any) -> str:
    """A value of a file, as long as one can read: a hostile or broken file may hold a name of a gigabyte."""
    text = repr(value[:_MAX_SHOWN]) if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= _MAX_SHOWN + 2 else f"{text[:_MAX_SHOWN]}..."


def shown_names(names: Sequence[str]) -> str:
    """A list of names, likewise."""
    listed = ", ".join(map(shown, names[:_MAX_NAMES_SHOWN]))
    rest = len(names) - _MAX_NAMES_SHOWN
    return f"[{listed}{f', and {rest:,} more' if rest > 0 else ''}]"


def is_file_source(source: str) -> bool:
    """Whether ``source`` names a file rather than a dataset on the Hub (or a folder that ``datasets`` reads)."""
    path = Path(source)
    if path.is_file():
        return True
    if Path(source.rpartition("@")[0] or source).is_dir():
        return False
    return (
        path.suffix.lower() in SUFFIXES
        or source.startswith((".", "/", "~"))
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w.\[\]:%-]+)?", source)
        or (path.parent != Path() and path.parent.is_dir())
    )


def read_rows(source: str, problems: Problems) -> Iterator[Row]:
    """Yield the rows of ``source``; rows that cannot be read go to ``problems`` and are skipped.

    Args:
        source: a .json, .jsonl, .csv or .parquet file, a folder that ``datasets.load_dataset`` reads, or a dataset on
            the Hub as ``name``, ``name:config``, ``name@split`` or ``name:config@split``; the default split is "train".
        problems: takes what is wrong with single rows.

    Raises:
        FileNotFoundError: if there is no such file; names the closest file names beside it.
        ValueError: if nothing of the source can be read.
    """
    if not is_file_source(source):
        yield from _hub_rows(source)
        return
    path = existing_file(source)
    readers = {".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    try:
        yield from readers.get(path.suffix.lower(), _json_lines)(path, problems)
    except MemoryError as error:  # a few kilobytes of Parquet can stand for gigabytes
        raise ValueError(f"{path} does not fit into memory when it is read: split it into several files") from error


def existing_file(source: str) -> Path:
    """The path of a readable, non-empty data file.

    Raises:
        FileNotFoundError: if it does not exist; names similar files.
        ValueError: if it is empty or of an unknown kind.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no data file at {path}{_similar(path)}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(SUFFIXES)}: rename or convert it")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: expected at least one row of data")
    size_gib, memory_gib = path.stat().st_size / 2**30, psutil.virtual_memory().total / 2**30
    if size_gib > memory_gib:
        raise ValueError(
            f"{path} has {size_gib:,.0f} GiB and this machine {memory_gib:.0f} GiB of memory, into which data is read: "
            "take a part of it"
        )
    return path


def source_digest(source: str) -> str:
    """SHA-256 of a file's content, or of a Hub dataset's own fingerprint (which loads it)."""
    if is_file_source(source):
        with existing_file(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{source} {_load_hub(source)._fingerprint}".encode()).hexdigest()


def _similar(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        return f": the folder {path.parent} does not exist ({folder} does)"
    names = [entry.name for entry in folder.iterdir()]
    close = closest(path.name, names, most=3, cutoff=0.5)
    close += [name for name in names if Path(name).stem == path.stem and name not in close]
    if close:
        return f": {did_you_mean(folder / name for name in close)}"
    data = sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)[:8]
    return f": {folder} holds {', '.join(data) if data else 'no data files'}"


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's reader takes the last of several equal names in silence."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the field {shown(_twice([name for name, _ in pairs]))} is there more than once")
    return fields


def _twice(names: list[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not valid JSON: nested too deeply"
    return "an integer of more than 4300 digits" if "integer string conversion" in str(error) else str(error)


def _json_lines(path: Path, problems: Problems) -> Iterator[Row]:
    with path.open("rb") as file:
        line_number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            line_number += 1
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                size = len(raw)
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    size += len(rest)
                size += len(rest)
                problems.add(
                    line_number, f"line of {size / 2**20:.1f} MiB, expected at most {MAX_LINE_BYTES >> 20} MiB"
                )
                continue
            if line_number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                value = _DECODER.decode(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                problems.add(line_number, _not_utf8(error))
            except (ValueError, RecursionError) as error:
                problems.add(line_number, _not_json(error))
            else:
                if isinstance(value, dict):
                    yield Row(line_number, value)
                else:
                    problems.add(line_number, f"a JSON {type(value).__name__}, expected an object with named fields")


def _json_rows(path: Path, problems: Problems) -> Iterator[Row]:
    """A .json file: one array of objects, or JSON Lines under another name."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        _refuse_single_object(path)
        yield from _json_lines(path, problems)
        return
    text = _decoded(path)
    position, line, counted_to = text.index("[") + 1, 1, 0
    space = re.compile(r"\s*")
    while True:
        position = _end_of(space, text, position)
        line += text.count("\n", counted_to, position)
        counted_to = position
        if text[position : position + 1] == "]":
            break
        try:
            value, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise ValueError(f"{path}:{at}: {_not_json(error)}; what follows cannot be read") from None
        if isinstance(value, dict):
            yield Row(line, value)
        else:
            problems.add(line, f"a JSON {type(value).__name__}, expected an object with named fields")
        position = _end_of(space, text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted_to, position)
            raise ValueError(f"{path}:{line}: not valid JSON: expected ',' or ']' after an object")
    if text[position + 1 :].strip():
        raise ValueError(f"{path}:{line}: not valid JSON: text after the end of the array")


def _refuse_single_object(path: Path) -> None:
    """A file that is one object over several lines would be reported line by line, which helps nobody."""
    with path.open("rb") as file:
        first_line = file.readline(MAX_LINE_BYTES)
    try:
        json.loads(first_line)
    except ValueError:
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return
        if isinstance(value, dict):
            raise ValueError(
                f"{path} is one JSON object with the keys {shown_names(sorted(value))}, expected an array of objects, "
                "or one object a line: save only the list of examples"
            ) from None
    except RecursionError:
        return


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    assert match is not None
    return match.end()


def _csv_rows(path: Path, problems: Problems) -> Iterator[Row]:
    text = _decoded(path)
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            got = f"{shown(_twice(header))} is there more than once" if header else "it is empty"
            raise ValueError(f"{path}:1: the header must name every column once, and {got}")
        for cells in reader:
            if len(cells) == len(header):
                yield Row(reader.line_num, dict(zip(header, cells, strict=True)))
            elif cells:
                problems.add(reader.line_num, f"{len(cells)} cells, expected {len(header)} {shown_names(header)}")
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}; what follows cannot be read") from None
    finally:
        csv.field_size_limit(previous_limit)


def _parquet_rows(path: Path, problems: Problems) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for fields in batch.to_pylist():
                number += 1
                yield Row(number, fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None


def _hub_rows(source: str) -> Iterator[Row]:
    for number, fields in enumerate(_load_hub(source), start=1):
        yield Row(number, dict(fields))


def _load_hub(source: str) -> Any:
    import datasets

    name, _, split = source.partition("@")
    config: str | None = None
    if not Path(name).is_dir():
        name, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets raises many unrelated types for "not there"; all become one message
        raise ValueError(
            f"{source!r} is neither a file nor a dataset that can be loaded ({type(error).__name__}: {error}). "
            "Expected a .json, .jsonl, .csv or .parquet file, or a Hub dataset as name, name:config, name@split or "
            f"name:config@split{_similar(Path(name)) if not Path(name).is_dir() else ''}"
        ) from error
    return dataset


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: {_not_utf8(error)}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}): convert the file to UTF-8"
