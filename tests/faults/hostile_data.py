"""Hostile data files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.hostile_cases import NO_FILES, cases, fit_on, huge, nested, pipe


def _row(value: bytes) -> bytes:
    return b'{"prompt": %s, "completion": "b"}\n' % value


_GOOD = _row(b'"a"')
_NAMES = ", ".join(f'"c{number}": "x"' for number in range(1_000_000)).encode()


def _parquet(path: Path, **columns: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _broken_footer(path: Path, change: Callable[[bytes], bytes]) -> None:
    _parquet(path, prompt=["a"] * 40, completion=["b"] * 40)
    path.write_bytes(change(path.read_bytes()))


def _repeated_text(path: Path) -> None:
    """A few kilobytes that stand for 4 GB: one long text, a thousand times."""
    import pyarrow

    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["x" * (4 << 20)])
    _parquet(path, prompt=column, completion=["b"] * 1000)


DATA = [
    *cases("data file", "hostile.jsonl", fit_on("hostile.jsonl"), {
        **NO_FILES,
        **{f"a list {depth} deep": _row(nested(depth)) for depth in (100, 900, 990, 10_000, 1_000_000)},
        **{f"objects {depth} deep": _row(b'{"a":' * depth + b"1" + b"}" * depth) for depth in (900, 100_000)},
        "messages 900 deep": b'{"messages": %s}\n' % nested(900),
        "a number of a million digits": _row(b"9" * 1_000_000),
        "a number of 4000 digits": _row(b"9" * 4000),
        "1e999": _row(b"1e999"),
        "NaN": _row(b"NaN"),
        "a line of 100 MB": _row(b'"%s"' % (b"a" * 100_000_000)),
        "a line of 15 MB that is no JSON": b"a" * 15_000_000,
        "texts of 100 kB": b'{"text": "%s"}\n' % (b"a b " * 25_000) * 12,
        "a field name of 10 MB": b'{"%s": "a"}\n' % (b"n" * 10_000_000),
        "a million fields": b"{%s}\n" % _NAMES,
        "a million fields in the second row": _GOOD + b"{%s}\n" % _NAMES,
        "a million fields, the last one twice": b'{%s, "c999999": "y"}\n' % _NAMES,
        "a million bad lines": b"{\n" * 1_000_000,
        "a million lines without end": b"\r" * 1_000_000,
        "escapes of half characters": _row(b'"%s"' % (b"\\ud800" * 100_000)),
        "gzip": gzip.compress(_GOOD * 40),
        "gzip of 200 MB": gzip.compress(bytes(200_000_000), 1),
        "UTF-16": (_GOOD * 40).decode().encode("utf-16"),
        "NULs in texts": _row(b'"a\\u0000b"') * 40,
        "control characters": _row(b'"\\u001b[2J\\u0007"') * 40,
        "roles of a megabyte": b'{"messages": [{"role": "%s", "content": "a"}]}\n' % (b"r" * 1_000_000),
        "a million turns": b'{"messages": [%s]}\n' % b",".join([b'{"role":"u","content":"a"}'] * 500_000),
    }, works=("texts of 100 kB", "NULs in texts", "control characters")),
    *cases("data file", "hostile.json", fit_on("hostile.json"), {
        "a tebibyte of zeros as .json": huge,
        "an array 1,000,000 deep": nested(1_000_000),
        "an object of a million fields": b"{%s}" % _NAMES,
        "an object of a million fields, in lines": b"{%s}" % _NAMES.replace(b", ", b",\n"),
        "a list in the 100,000th place": b"[" + b",".join([_GOOD.strip()] * 100_000) + b",",
    }),
    *cases("data file", "hostile.csv", fit_on("hostile.csv"), {
        "a tebibyte of zeros as .csv": huge,
        "a million columns": b",".join(b"c%d" % number for number in range(1_000_000)) + b"\n1,2\n",
        "a million columns of one name": b"prompt," * 1_000_000 + b"completion\n",
        "a quote that never closes": b'prompt,completion\n"' + b"a\n" * 10_000_000,
        "a cell of 50 MB": b"prompt,completion\n" + b"a" * 50_000_000 + b",b\n",
        "NULs as .csv": b"prompt,completion\na\0b,c\n" + bytes(1000),
    }),
    *cases("data file", "hostile.parquet", fit_on("hostile.parquet"), {
        "no footer": lambda path: _broken_footer(path, lambda data: data[:-8]),
        "a footer longer than the file": lambda path: _broken_footer(
            path, lambda data: data[:-8] + struct.pack("<I", 0xFFFFFFFF) + data[-4:]),
        "a footer of NULs": lambda path: _broken_footer(path, lambda data: data[:-200] + bytes(192) + data[-8:]),
        "pages of NULs": lambda path: _broken_footer(path, lambda data: data[:4] + bytes(100) + data[104:]),
        "4 GB of one text": _repeated_text,
        "a pipe without a writer as .parquet": pipe,
        "JSON as .parquet": _GOOD * 40,
    }),
]  # fmt: skip
