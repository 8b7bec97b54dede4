"""Files to blocks of rows, strictly, and blocks to rows.

A block is what one worker takes at a time: bytes that hold about a thousand rows, with the number of the first line. A
broken line must not vanish: every one is named by file and line, and decoding is never lenient. Lines of JSON are cut
into blocks without being decoded, which is left to whoever takes the block; JSON arrays and CSV have to be parsed to
be cut. Everything but an array of JSON is read in pieces, however large the file.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import pickle
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from lit_lora.data.rows.rows import Problems, Row, shown, shown_names

BLOCK_ROWS = 1000
BLOCK_BYTES = 4 * 2**20
MAX_LINE_BYTES = 16 * 2**20
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")


class Block(NamedTuple):
    """Some rows of a source, one after the other."""

    file: str
    """Put before line numbers."""
    kind: Literal["lines", "rows", "arrow"]
    payload: bytes
    """Lines of JSON; or pickled pairs of a line number and a row, or what is wrong with it; or a batch of Arrow."""
    first: int
    """Number of the first line or row."""
    too_long: dict[int, str]
    """What is wrong with lines that are left out of the payload, by their number."""
    done: int
    """Bytes (of a file) or rows (of a dataset) read up to the end of this block."""


def rows_of(block: Block, problems: Problems) -> Iterator[Row]:
    """Yield the rows of a block; those that cannot be read go to ``problems`` and are skipped."""
    problems.file = block.file
    if block.kind == "lines":
        yield from _decoded_lines(block, problems)
    elif block.kind == "rows":
        for line, value in pickle.loads(block.payload):
            if isinstance(value, str):
                problems.add(line, value)
            else:
                yield Row(line, value)
    else:
        import pyarrow.ipc

        with pyarrow.ipc.open_stream(block.payload) as stream:
            for number, fields in enumerate(stream.read_all().to_pylist(), start=block.first):
                yield Row(number, fields)


def suffix_of(path: Path) -> str:
    """How its name ends, without the suffix of a compression."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def file_blocks(path: Path, name: str) -> Iterator[Block]:
    """The rows of a file.

    Args:
        path: of the file; how its name ends says what it is.
        name: put before line numbers.

    Raises:
        ValueError: if the file as a whole cannot be read.
    """
    readers = {".json": _json_blocks, ".csv": _csv_blocks, ".parquet": _parquet_blocks}
    try:
        yield from readers.get(suffix_of(path), _line_blocks)(path, name)
    except MemoryError as error:  # a few kilobytes of Parquet can stand for gigabytes
        raise ValueError(f"{path} does not fit into memory when it is read: split it into several files") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The content of a file that may be compressed, and the file itself, whose position tells how far one is."""
    kind = path.suffix.lower()
    with path.open("rb") as file:
        if kind not in COMPRESSED:
            yield file, file
            return
        errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
        try:
            if kind == ".gz":
                content: Any = gzip.GzipFile(fileobj=file)
            else:
                import pyarrow

                errors = (*errors, pyarrow.ArrowException)
                content = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"))
            yield content, file
        except errors as error:
            what = "gzip" if kind == ".gz" else "Zstandard"
            raise ValueError(f"{path}: not a readable {what} file: {error}; what follows cannot be read") from None


def _line_blocks(path: Path, name: str) -> Iterator[Block]:
    with _opened(path) as (content, file):
        lines: list[bytes] = []
        too_long: dict[int, str] = {}
        number = size = 0
        while raw := content.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                length = len(raw)
                while (rest := content.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    length += len(rest)
                mib = (length + len(rest)) / 2**20
                too_long[number] = f"line of {mib:.1f} MiB, expected at most {MAX_LINE_BYTES >> 20} MiB"
                raw = b"\n"
            lines.append(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)
            size += len(raw)
            if len(lines) == BLOCK_ROWS or size >= BLOCK_BYTES:
                yield Block(name, "lines", b"".join(lines), number - len(lines) + 1, too_long, file.tell())
                lines, too_long, size = [], {}, 0
        if lines:
            yield Block(name, "lines", b"".join(lines), number - len(lines) + 1, too_long, file.tell())


def _decoded_lines(block: Block, problems: Problems) -> Iterator[Row]:
    for line, raw in enumerate(io.BytesIO(block.payload), start=block.first):
        if line in block.too_long:
            problems.add(line, block.too_long[line])
        if not raw.strip():
            continue
        try:
            value = _DECODER.decode(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.add(line, _not_utf8(error))
        except (ValueError, RecursionError) as error:
            problems.add(line, _not_json(error))
        else:
            if isinstance(value, dict):
                yield Row(line, value)
            else:
                problems.add(line, _no_object(value))


def _row_blocks(name: str, rows: Iterable[tuple[int, dict[str, Any] | str]], done: int) -> Iterator[Block]:
    """Blocks of parsed rows, in whose place may stand what is wrong with them."""
    gathered: list[tuple[int, dict[str, Any] | str]] = []
    size = 0
    for line, value in rows:
        gathered.append((line, value))
        texts = [value] if isinstance(value, str) else value.values()
        size += sum(len(text) for text in texts if isinstance(text, str))
        if len(gathered) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Block(name, "rows", pickle.dumps(gathered), gathered[0][0], {}, done)
            gathered, size = [], 0
    if gathered:
        yield Block(name, "rows", pickle.dumps(gathered), gathered[0][0], {}, done)


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


def _no_object(value: Any) -> str:
    return f"a JSON {type(value).__name__}, expected an object with named fields"


def _json_blocks(path: Path, name: str) -> Iterator[Block]:
    """A .json file: one array of objects, or JSON Lines under another name."""
    with _opened(path) as (content, _):
        start = content.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from _row_blocks(name, _array(path), path.stat().st_size)
    else:
        _refuse_single_object(path)
        yield from _line_blocks(path, name)


def _array(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
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
        yield line, value if isinstance(value, dict) else _no_object(value)
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
    with _opened(path) as (content, _):
        first_line = content.readline(MAX_LINE_BYTES)
    try:
        json.loads(first_line)
    except ValueError:
        try:
            with _opened(path) as (content, _):
                value = json.loads(content.read())
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


def _csv_blocks(path: Path, name: str) -> Iterator[Block]:
    with _opened(path) as (content, file):
        for block in _row_blocks(name, _csv_rows(path, content), 0):
            yield block._replace(done=file.tell())


def _csv_rows(path: Path, content: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    text = io.TextIOWrapper(cast("Any", content), encoding="utf-8-sig", newline="")
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            got = f"{shown(_twice(header))} is there more than once" if header else "it is empty"
            raise ValueError(f"{path}:1: the header must name every column once, and {got}")
        for cells in reader:
            if len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                yield reader.line_num, f"{len(cells)} cells, expected {len(header)} {shown_names(header)}"
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not valid CSV: {error}; what follows cannot be read") from None
    except UnicodeDecodeError:
        _decoded(path)  # says on which line
        raise
    finally:
        csv.field_size_limit(previous_limit)
        text.detach()


def _parquet_blocks(path: Path, name: str) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number, rows = 1, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=BLOCK_ROWS):
            for block in arrow_blocks(batch, name, number):
                share = (block.done) / rows
                yield block._replace(done=int(share * path.stat().st_size))
            number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None


def arrow_blocks(batch: Any, name: str, first: int) -> Iterator[Block]:
    """A record batch of Arrow as blocks: one, or several where its rows are large."""
    parts = min(batch.num_rows, -(-batch.nbytes // BLOCK_BYTES)) or 1
    length = -(-batch.num_rows // parts)
    for start in range(0, batch.num_rows, max(1, length)):
        part = batch.slice(start, length)
        yield Block(name, "arrow", arrow_bytes(part), first + start, {}, first + start + part.num_rows - 1)


def arrow_bytes(batch: Any) -> bytes:
    """A record batch with its schema: the same bytes for the same content."""
    import pyarrow
    import pyarrow.ipc

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema.remove_metadata()) as stream:
        stream.write_batch(batch.replace_schema_metadata(None))
    return bytes(sink.getvalue())


def _decoded(path: Path) -> str:
    with _opened(path) as (content, _):
        raw = content.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: {_not_utf8(error)}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start}): convert the file to UTF-8"
