"""Hostile checkpoints, and files in the folder of a run."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lit_lora.files.checkpoint import CHECKSUM
from tests.faults.hostile_cases import MARK, NO_FILES, Content, cases, fit, nested
from tests.faults.hostile_configs import YAMLS
from tests.faults.runs import Project


def _going_on(project: Project, folder: Path) -> list[str]:
    return [*fit(project, folder), "--ckpt_path", str(folder / "hostile.ckpt")]


def _exporting(project: Project, folder: Path) -> list[str]:
    folder.mkdir()
    return ["export", str(folder / "hostile.ckpt"), str(folder / "out")]


class _Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def _zip(parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint as torch writes it, of these parts."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for name, data in {"version": b"3\n", "byteorder": b"little", **parts}.items():
            archive.writestr(f"hostile/{name}", data)
    return file.getvalue()


def _saved(**content: Any) -> Content:
    def make(path: Path) -> None:
        torch.save({"state_dict": {}, "global_step": 1, **content}, path)

    return make


def _shared(depth: int, kind: Callable[[Any], Any]) -> Any:
    value: Any = [1]
    for _ in range(depth):
        value = kind(value)
    return value


def _endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


_PICKLED = pickle.dumps({"state_dict": {}, "global_step": 1}, protocol=2)
_CKPTS: dict[str, Content] = {
    **NO_FILES,
    "code in a zip": _zip({"data.pkl": pickle.dumps({"state_dict": _Code()}, protocol=2)}),
    "code in a pickle": pickle.dumps({"state_dict": _Code()}, protocol=2),
    "code saved by torch": _saved(x=_Code()),
    "code saved by torch, the old way": lambda path: torch.save(
        {"state_dict": _Code()}, path, _use_new_zipfile_serialization=False
    ),
    "a script of torch": lambda path: torch.jit.save(torch.jit.script(torch.nn.Identity()), path),
    "a gigabyte of zeros in a small zip": lambda path: path.write_bytes(_compressed("data.pkl")),
    "a compressed tensor": lambda path: path.write_bytes(_compressed("data/0")),
    "lists that double": _saved(x=_shared(60, lambda value: [value, value])),
    "mappings that double": _saved(x=_shared(60, lambda value: {"a": value, "b": value})),
    "lists that double, with a checksum": _saved(x=_shared(60, lambda value: [value, value]), **{CHECKSUM: "x"}),
    "a list within itself": _saved(x=_endless()),
    "a list within itself, with a checksum": _saved(x=_endless(), **{CHECKSUM: "x"}),
    "a list 300 deep, with a checksum": _saved(x=_shared(300, lambda value: [value]), **{CHECKSUM: "x"}),
    "a list 2000 deep": lambda path: path.write_bytes(_zip({"data.pkl": _deep_pickle(2000)})),
    "a list 100,000 deep": lambda path: path.write_bytes(_zip({"data.pkl": _deep_pickle(100_000)})),
    "a list 100,000 deep, with a checksum": lambda path: path.write_bytes(
        _zip({"data.pkl": _deep_pickle(100_000, CHECKSUM)})
    ),
    "one number as a tebibyte": _saved(x=torch.zeros(1).expand(1 << 38), **{CHECKSUM: "x"}),
    "one number as a tebibyte of weights": _saved(state_dict={"x": torch.zeros(1).expand(1 << 38)}),
    "a million times one tensor": _saved(x=[torch.zeros(100_000)] * 100_000, **{CHECKSUM: "x"}),
    "a tensor without values": _saved(x=torch.zeros(4, device="meta"), **{CHECKSUM: "x"}),
    "a sparse tensor": _saved(x=torch.zeros(4, 4).to_sparse(), **{CHECKSUM: "x"}),
    "a number of a million digits": _saved(x=10**1_000_000, **{CHECKSUM: "x"}),
    "a text of a gigabyte that is not there": _zip({"data.pkl": b"\x80\x02X\x00\x00\x00\x40" + b"a" * 100}),
    "a memo of 2**32 places": _zip({"data.pkl": b"\x80\x02Nr\xff\xff\xff\xff."}),
    "an unknown storage": _zip({"data.pkl": _PICKLED[:-1] + b"Q."}),
    "a list": lambda path: torch.save([1], path),
    "weights that are a list": _saved(state_dict=[1]),
    "gzip": gzip.compress(_PICKLED),
    "a zip of 60,000 files": lambda path: path.write_bytes(_zip({f"data/{n}": b"" for n in range(60_000)})),
}


def _deep_pickle(depth: int, *keys: str) -> bytes:
    """A list in a list, which pickle itself could not write."""
    opening = b"\x80\x02}(X\x0a\x00\x00\x00state_dict}"
    for key in keys:
        opening += b"X" + struct.pack("<I", len(key)) + key.encode() + b"X\x01\x00\x00\x00x"
    return opening + b"X\x01\x00\x00\x00x" + b"]" * depth + b"a" * (depth - 1) + b"u."


@cache
def _compressed(part: str) -> bytes:
    """A checkpoint of a tensor, one part of it replaced by a gigabyte of zeros, compressed to a few megabytes."""
    file = io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(1 << 20)}}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    return _zip({**parts, part: bytes(1 << 30)}, zipfile.ZIP_DEFLATED)


CHECKPOINT = [
    *cases("checkpoint", "hostile.ckpt", _going_on, _CKPTS),
    *cases("checkpoint", "hostile.ckpt", _exporting, {f"{name}, exported": made for name, made in _CKPTS.items()}),
]

# What lies in the folder of a run.


def _in_run(project: Project, folder: Path) -> list[str]:
    """The folder of a finished run, which is to be gone on with."""
    arguments = fit(project, folder)
    shutil.copytree(project.folder / "whole" / "run", folder / "run")
    return [*arguments, "--ckpt_path", "last"]


_RUN: dict[str, Content] = {name: content for name, content in NO_FILES.items() if content is not Path.mkdir}
_VERDICTS: dict[str, Content] = {
    "a verdict 1,000,000 deep": nested(1_000_000),
    "a verdict 900 deep": b'{"format": 1, "step": %s}' % nested(900),
    "a verdict of a million digits": b'{"format": 1, "step": %s}' % (b"9" * 1_000_000),
    "a step that is infinite": b'{"format": 1, "step": 1e999, "verdicts": [], "finished": true, "stopped_early": true,'
    b' "base": "", "changes": [], "no_step_left": "", "losses": [], "speed": []}',
    "a step that is text": b'{"format": 1, "step": "x", "verdicts": [], "finished": true, "stopped_early": true,'
    b' "base": 3, "changes": 4, "no_step_left": [], "losses": 5, "speed": {}}',
}
_CONFIGS = {f"config.yaml: {name}": content for name, content in {**_RUN, **YAMLS}.items()
            if name in _RUN or "laughs" in name}  # fmt: skip
_LAST = {f"last checkpoint: {name}": content for name, content in {**_RUN, **_CKPTS}.items()
         if name in _RUN or "a list" in name or "code" in name or "compressed" in name or "double" in name}  # fmt: skip
RUN = [
    *cases("file of a run", "run/verdict.json", _in_run, {**_RUN, **_VERDICTS}, works=(*_RUN, *_VERDICTS)),
    *cases("file of a run", "run/config.yaml", _in_run, _CONFIGS, works=tuple(_CONFIGS)),
    *cases("file of a run", "run/checkpoints/step=99.ckpt", _in_run, _LAST, works=tuple(_LAST)),
]
