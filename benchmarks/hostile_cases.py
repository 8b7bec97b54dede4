"""The table of hostile files: what is put where, and which verb reads it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from fault_runs import Project

from lit_lora.checkpoint import CHECKSUM

MARK = "code-ran"
"""File that is made by code which must not run."""

Content = bytes | Callable[[Path], object]
"""Of a file, or what makes it."""


@dataclass(frozen=True)
class Case:
    """One hostile file."""

    kind: str
    name: str
    file: str
    """Where it lies in the folder of the case."""
    content: Content
    prepare: Callable[[Project, Path], list[str]]
    """Make the folder with everything else in it; the arguments of the command that reads it."""
    named: str
    """What the message names."""
    works: bool
    """Whether there is nothing wrong with it."""

    def put(self, folder: Path) -> None:
        """Make the file."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)


def _cases(
    kind: str,
    file: str,
    prepare: Callable[[Project, Path], list[str]],
    contents: dict[str, Content],
    *,
    named: str | None = None,
    works: tuple[str, ...] = (),
) -> list[Case]:
    assert set(works) <= set(contents)
    return [
        Case(kind, name, file, content, prepare, named or Path(file).name, name in works)
        for name, content in contents.items()
    ]


# Ways to be no file, for any kind.


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    """A tebibyte of zeros that takes no space."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


NO_FILES: dict[str, Content] = {
    "a pipe without a writer": _fifo,
    "a folder": Path.mkdir,
    "a link to itself": _loop,
    "/dev/zero": _zeros,
    "a tebibyte of zeros": _huge,
    "nothing but NULs": bytes(5000),
}

# Data.


def _fit(project: Project, folder: Path, **settings: Any) -> list[str]:
    folder.mkdir()
    config = project.config(folder.name)
    config["data"]["cache_dir"] = str(folder / "cache")
    config["trainer"]["default_root_dir"] = str(folder / "run")
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    (folder / "sound.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(folder / "sound.yaml")]


def _fit_on(file: str) -> Callable[[Project, Path], list[str]]:
    return lambda project, folder: _fit(project, folder, data__train=str(folder / file))


def _nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


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
    """A few kilobytes that stand for 16 GB: one long text, a thousand times."""
    import pyarrow

    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["x" * (16 << 20)])
    _parquet(path, prompt=column, completion=["b"] * 1000)


DATA = [
    *_cases("data file", "hostile.jsonl", _fit_on("hostile.jsonl"), {
        **NO_FILES,
        **{f"a list {depth} deep": _row(_nested(depth)) for depth in (100, 900, 990, 10_000, 1_000_000)},
        **{f"objects {depth} deep": _row(b'{"a":' * depth + b"1" + b"}" * depth) for depth in (900, 100_000)},
        "messages 900 deep": b'{"messages": %s}\n' % _nested(900),
        "a number of a million digits": _row(b"9" * 1_000_000),
        "a number of 4000 digits": _row(b"9" * 4000),
        "1e999": _row(b"1e999"),
        "NaN": _row(b"NaN"),
        "a line of 100 MB": _row(b'"%s"' % (b"a" * 100_000_000)),
        "a line of 15 MB that is no JSON": b"a" * 15_000_000,
        "a text of 3 MB": _row(b'"%s"' % (b"a b " * 750_000)),
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
    }, works=("a text of 3 MB", "NULs in texts", "control characters")),
    *_cases("data file", "hostile.json", _fit_on("hostile.json"), {
        "a tebibyte of zeros as .json": _huge,
        "an array 1,000,000 deep": _nested(1_000_000),
        "an object of a million fields": b"{%s}" % _NAMES,
        "an object of a million fields, in lines": b"{%s}" % _NAMES.replace(b", ", b",\n"),
        "a list in the 100,000th place": b"[" + b",".join([_GOOD.strip()] * 100_000) + b",",
    }),
    *_cases("data file", "hostile.csv", _fit_on("hostile.csv"), {
        "a tebibyte of zeros as .csv": _huge,
        "a million columns": b",".join(b"c%d" % number for number in range(1_000_000)) + b"\n1,2\n",
        "a million columns of one name": b"prompt," * 1_000_000 + b"completion\n",
        "a quote that never closes": b'prompt,completion\n"' + b"a\n" * 10_000_000,
        "a cell of 50 MB": b"prompt,completion\n" + b"a" * 50_000_000 + b",b\n",
        "NULs as .csv": b"prompt,completion\na\0b,c\n" + bytes(1000),
    }),
    *_cases("data file", "hostile.parquet", _fit_on("hostile.parquet"), {
        "no footer": lambda path: _broken_footer(path, lambda data: data[:-8]),
        "a footer longer than the file": lambda path: _broken_footer(
            path, lambda data: data[:-8] + struct.pack("<I", 0xFFFFFFFF) + data[-4:]),
        "a footer of NULs": lambda path: _broken_footer(path, lambda data: data[:-200] + bytes(192) + data[-8:]),
        "pages of NULs": lambda path: _broken_footer(path, lambda data: data[:4] + bytes(100) + data[104:]),
        "16 GB of one text": _repeated_text,
        "a pipe without a writer as .parquet": _fifo,
        "JSON as .parquet": _GOOD * 40,
    }),
]  # fmt: skip

# Adapters.


def _generate(project: Project, folder: Path) -> list[str]:
    folder.mkdir()
    shutil.copytree(project.folder / "whole" / "run" / "adapter", folder / "adapter")
    return ["generate", "hello", "--adapter", str(folder / "adapter"), "--base", f"random:{project.folder / 'base'}",
            "--max_new_tokens", "2", "--stream", "false"]  # fmt: skip


def _generate_unrecorded(project: Project, folder: Path) -> list[str]:
    """With an adapter as PEFT writes it: its run's config says what it was trained on."""
    from safetensors.torch import load_file, save_file

    arguments = _generate(project, folder)
    weights = folder / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    return arguments


def _config(**changes: Any) -> Content:
    """The adapter's own configuration, with changes."""
    content = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "base_model_name_or_path": "x",
    }  # fmt: skip
    return json.dumps({**content, **changes}).encode()


def _raw_config(field: bytes, value: bytes) -> Content:
    text = _config()
    assert isinstance(text, bytes)
    return text[:-1] + b', "%s": %s}' % (field, value)


_SLOW = (r"((.+)+)+X", r"(.*)*(.*)*(.*)*(.*)*=", r"^(([a-z_.0-9])+.)+[A-Z]([a-z])+$")
_LARGE = (
    "((((a{1,99}){1,99}){1,99}){1,99}){1,99}",
    "(" * 5000 + ")" * 5000,
    "|".join(["x"] * 1_000_000),
    "a" * 5_000_000,
)


def _expressions(expressions: tuple[str, ...], name: str) -> dict[str, Content]:
    found: dict[str, Content] = {}
    for number, text in enumerate(expressions):
        found |= {
            f"{name} expression {number} in target_modules": _config(target_modules=text),
            f"{name} expression {number} in exclude_modules": _config(exclude_modules=text),
            f"{name} expression {number} in rank_pattern": _config(rank_pattern={text: 2}),
            f"{name} expression {number} in alpha_pattern": _config(alpha_pattern={text: 2}),
            f"{name} expression {number} in layers_pattern": _config(layers_pattern=text, layers_to_transform=[0]),
        }
    return found


def _header(entries: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(entries) if length is None else length) + entries + data


def _entry(shape: str, start: int, end: int, dtype: str = "F32", name: str = "x") -> bytes:
    return b'"%s":{"dtype":"%s","shape":%s,"data_offsets":[%d,%d]}' % (
        name.encode(), dtype.encode(), shape.encode(), start, end)  # fmt: skip


_LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTER = [
    *_cases("adapter_config.json", "adapter/adapter_config.json", _generate, {
        **NO_FILES,
        **_expressions(_SLOW, "slow"),
        **_expressions(_LARGE, "large"),
        **{f"nested {depth} deep": _raw_config(b"auto_mapping", _nested(depth)) for depth in (900, 990, 1_000_000)},
        **{f"{name} nested 990 deep": _raw_config(name.encode(), _nested(990))
           for name in ("r", "target_modules", "rank_pattern", "lora_dropout", "layer_replication", "a_new_field")},
        **{f"{name} of a million digits": _raw_config(name.encode(), b"9" * 1_000_000) for name in ("r", "lora_alpha")},
        **{f"{name} of 4000 digits": _raw_config(name.encode(), b"9" * 4000)
           for name in ("r", "lora_alpha", "lora_dropout", "layers_to_transform")},
        **{f"{name} 1e999": _raw_config(name.encode(), b"1e999") for name in ("r", "lora_alpha", "lora_dropout")},
        "r 10**12": _config(r=10**12),
        "a million layers": _config(layers_to_transform=list(range(1_000_000))),
        "a million target_modules": _config(target_modules=[f"m{number}" for number in range(1_000_000)]),
        "half a million exclude_modules": _config(exclude_modules=[f"m{number}" for number in range(500_000)]),
        "100,000 rank patterns": _config(rank_pattern={f"m{number}.*": 2 for number in range(100_000)}),
        "a million keys": b"{%s}" % _NAMES,
        "a value of 15 MB that is not known": _config(a_new_field="x" * 15_000_000),
        "a base of a megabyte": _config(base_model_name_or_path="x/" * 500_000),
        "gzip of adapter_config.json": gzip.compress(_config()),  # type: ignore[arg-type]
    }, named="adapter"),
    *_cases("weights", "adapter/adapter_model.safetensors", _generate, {
        **NO_FILES,
        "a header of 2**63 bytes": _header(b"{}", 1 << 63),
        "a header of 2**64 - 1 bytes": _header(b"{}", (1 << 64) - 1),
        "a header of the whole file and more": _header(b"{}" + b" " * 100, 1000),
        "a header of 90 MB of spaces": _header(b"{}" + b" " * 90_000_000),
        "a header 1,000,000 deep": _header(b'{"x":' + _nested(1_000_000) + b"}"),
        "a header 900 deep": _header(b'{"__metadata__":' + _nested(900) + b"}"),
        "half a million tensors": _header(
            b"{" + b",".join(_entry("[0]", 0, 0, name=f"t{n}") for n in range(400_000)) + b"}"),
        "a tensor of a tebibyte": _header(b"{" + _entry(f"[{1 << 38}]", 0, 1 << 40) + b"}"),
        "a tensor of a tebibyte by name": _header(b"{" + _entry(f"[4, {1 << 36}]", 0, 1 << 40, name=_LORA) + b"}"),
        "a shape that overflows": _header(b"{" + _entry(f"[{1 << 32}, {1 << 32}, {1 << 32}]", 0, 0) + b"}"),
        "a shape of a million dimensions": _header(b"{" + _entry(str([1] * 1_000_000), 0, 4) + b"}", data=bytes(4)),
        "a negative shape": _header(b"{" + _entry("[-1, -4]", 0, 16, name=_LORA) + b"}", data=bytes(16)),
        "a shape of 5000 digits": _header(b"{" + _entry("[" + "9" * 5000 + "]", 0, 4) + b"}", data=bytes(4)),
        "overlapping tensors": _header(
            b"{" + _entry("[4]", 0, 16) + b"," + _entry("[4]", 0, 16, name="y") + b"}", data=bytes(16)),
        "a hole between tensors": _header(
            b"{" + _entry("[1]", 0, 4) + b"," + _entry("[1]", 1000, 1004, name="y") + b"}", data=bytes(1004)),
        "offsets that run backwards": _header(b"{" + _entry("[4]", 16, 0) + b"}", data=bytes(16)),
        "offsets of 2**64": _header(b"{" + _entry("[4]", 0, 1 << 64) + b"}", data=bytes(16)),
        "one name twice": _header(b"{" + _entry("[1]", 0, 4) + b"," + _entry("[1]", 4, 8) + b"}", data=bytes(8)),
        "metadata that is no text": _header(b'{"__metadata__":{"lit_lora_trained_on":[1]}}'),
        "metadata nested in text": _header(
            json.dumps({"__metadata__": {"lit_lora_trained_on": "[" * 1_000_000}}).encode()),
        "a pickle": pickle.dumps({"x": 1}),
    }, named="adapter"),
]  # fmt: skip


# The tokenizer beside an adapter.


def _with_tokenizer(project: Project, folder: Path) -> list[str]:
    """A tokenizer as a folder, which a fit takes."""
    from lit_lora.models import load_tokenizer

    arguments = _fit(project, folder, data__tokenizer=str(folder / "tokenizer"))
    load_tokenizer("bytes").save_pretrained(folder / "tokenizer")
    return arguments


def _changed(change: Callable[[dict[str, Any]], object]) -> Content:
    """The JSON that is there, changed."""

    def make(path: Path) -> None:
        content = json.loads(_sound_tokenizer(path.name))
        change(content)
        path.write_text(json.dumps(content))

    return make


def _sound_tokenizer(name: str) -> str:
    import tempfile

    from lit_lora.models import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer("bytes").save_pretrained(folder)
        return (Path(folder) / name).read_text()


_TEMPLATES = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a text that doubles": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}",
    "a text times 10**11": "{{ 'a' * 100000000000 }}",
    "a list times 10**11": "{{ ([0] * 100000000000) | length }}",
    "a power tower": "{{ 9 ** 9 ** 9 }}",
    "a field of a terabyte": "{{ '%1000000000000d' % 1 }}",
    "a format of a terabyte": "{{ '{:>1000000000000}'.format(1) }}",
    "centred on a terabyte": "{{ 'x' | center(1000000000000) }}",
    "lorem ipsum": "{{ lipsum(n=100000000) }}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "brackets 100,000 deep": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "conditions 5000 deep": "{% if true %}" * 5000 + "{% endif %}" * 5000,
    "a template of 20 MB": "{{ 1 }}" * 3_000_000,
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{{ cycler.__init__.__globals__.os.popen('touch code-ran') }}",
    "code of the standard library": "{{ self.__init__.__globals__.__builtins__.open('code-ran', 'w') }}",
}


def _slow_splits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "((.|.)+)+~"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def _slow_replaces(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "((.|.)+)+~"}, "content": ""}


def _growing_replaces(content: dict[str, Any]) -> None:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 40}


TOKENIZER = [
    *_cases("tokenizer", "tokenizer/tokenizer_config.json", _with_tokenizer, {
        **{name: content for name, content in NO_FILES.items() if name != "a link to itself"},
        "nested 1,000,000 deep": b'{"x": %s}' % _nested(1_000_000),
        "nested 990 deep": b'{"x": %s}' % _nested(990),
        "a length of a million digits": b'{"model_max_length": %s}' % (b"9" * 1_000_000),
        "a class of someone": _changed(lambda content: content.update(tokenizer_class="os.system")),
    }, named="tokenizer", works=("a class of someone",)),
    *_cases("tokenizer", "tokenizer/chat_template.jinja", _with_tokenizer, {
        f"template: {name}": text.encode() for name, text in _TEMPLATES.items()
    }, named="tokenizer"),
    *_cases("tokenizer", "tokenizer/tokenizer.json", _with_tokenizer, {
        "a pipe for tokenizer.json": _fifo,
        "a tebibyte for tokenizer.json": _huge,
        "tokenizer.json nested 1,000,000 deep": b'{"x": %s}' % _nested(1_000_000),
        "an expression that is slow at splitting": _changed(_slow_splits),
        "an expression that is slow at replacing": _changed(_slow_replaces),
        "a text that grows": _changed(_growing_replaces),
        "a token of number 2**63": _changed(
            lambda content: content["added_tokens"].append({**content["added_tokens"][0], "id": 1 << 63})),
        "no model": _changed(lambda content: content.pop("model")),
        "a list": b"[]",
    }, named="tokenizer"),
]  # fmt: skip

# Configs of training.


def _as_config(project: Project, folder: Path) -> list[str]:
    return [*_fit(project, folder), "--config", str(folder / "hostile.yaml")]


_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
_YAMLS: dict[str, Content] = {
    "a billion laughs": _LAUGHS.encode(),
    "a billion laughs of mappings": b"a0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {x: *a%d, y: *a%d}\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
    "merges of merges": b"a0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
    "an anchor within itself": b"model: &a [*a]\n",
    "a merge of itself": b"model: &a {<<: *a}\n",
    "brackets 100,000 deep": b"model: " + _nested(100_000),
    "braces 20,000 deep": b"model: " + b"{a: " * 20_000 + b"1" + b"}" * 20_000,
    "dashes 50,000 deep": b"model: \n" + b"- " * 50_000,
    "indented 600 deep": b"\n".join(b" " * n + b"a:" for n in range(600)),
    "an integer of 200,000 digits": b"seed_everything: " + b"9" * 200_000,
    "a hexadecimal number of 200,000 digits": b"seed_everything: 0x" + b"f" * 200_000,
    "a key of 200,000 characters": b"k" * 200_000 + b": 1\n",
    "19,000 unknown keys": b"".join(b"k%d: 1\n" % n for n in range(9_000)),
    "19,000 unknown keys of the model": b"model:\n" + b"".join(b"  k%d: 1\n" % n for n in range(9_000)),
    "a line of 100 MB": b"model: " + b"a" * 100_000_000,
    "code": b"model: !!python/object/apply:os.system ['touch code-ran']\n",
    "a class of the standard library": b"trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: "
    b"[touch, code-ran]}}]}\n",
    "a thousand documents": b"--- {}\n" * 1000,
    "quotes without end": b'model: "' + b"a\\\n" * 100_000,
    "a directive of version 9": b"%YAML 9.9\n--- {}\n",
    "gzip": gzip.compress(b"model: {}"),
    "a slow base": b"model: {base: '" + b"a/" * 100_000 + b"'}\n",
    "a deep value of a setting": b"model: {lora: {rank_pattern: " + b"{a: " * 45 + b"1" + b"}" * 45 + b"}}\n",
}
_INFINITE: dict[str, Content] = {"1e999": b"model: {learning_rate: 1e999}\n"}
_SIXTIES: dict[str, Content] = {"sixty times sixty": b"seed_everything: " + b"1:" * 60_000 + b"1"}
_SLOW_LAYERS: dict[str, Content] = {
    f"slow target_modules {number}": b"model: {lora: {target_modules: '%s'}}\n" % text.encode()
    for number, text in enumerate(_SLOW)
}
CONFIG = [
    *_cases("training config", "hostile.yaml", _as_config, {**NO_FILES, **_YAMLS}),
    *_cases("training config", "hostile.yaml", _as_config, _INFINITE, named="model.learning_rate"),
    *_cases("training config", "hostile.yaml", _as_config, _SIXTIES, named="seed_everything"),
    *_cases("training config", "hostile.yaml", _as_config, _SLOW_LAYERS, named="target_modules"),
    *_cases("config beside an adapter", "config.yaml", _generate_unrecorded, {**NO_FILES, **_YAMLS}, works=(
        "a pipe without a writer", "a folder", "a link to itself", "/dev/zero", "a directive of version 9")),
]  # fmt: skip

# Checkpoints.


def _going_on(project: Project, folder: Path) -> list[str]:
    return [*_fit(project, folder), "--ckpt_path", str(folder / "hostile.ckpt")]


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
    *_cases("checkpoint", "hostile.ckpt", _going_on, _CKPTS),
    *_cases("checkpoint", "hostile.ckpt", _exporting, {f"{name}, exported": made for name, made in _CKPTS.items()}),
]

# What lies in the folder of a run.


def _in_run(project: Project, folder: Path) -> list[str]:
    """The folder of a finished run, which is to be gone on with."""
    arguments = _fit(project, folder)
    shutil.copytree(project.folder / "whole" / "run", folder / "run")
    return [*arguments, "--ckpt_path", "last"]


_RUN: dict[str, Content] = {name: content for name, content in NO_FILES.items() if content is not Path.mkdir}
_VERDICTS: dict[str, Content] = {
    "a verdict 1,000,000 deep": _nested(1_000_000),
    "a verdict 900 deep": b'{"format": 1, "step": %s}' % _nested(900),
    "a verdict of a million digits": b'{"format": 1, "step": %s}' % (b"9" * 1_000_000),
    "a step that is infinite": b'{"format": 1, "step": 1e999, "verdicts": [], "finished": true, "stopped_early": true,'
    b' "base": "", "changes": [], "no_step_left": "", "losses": [], "speed": []}',
    "a step that is text": b'{"format": 1, "step": "x", "verdicts": [], "finished": true, "stopped_early": true,'
    b' "base": 3, "changes": 4, "no_step_left": [], "losses": 5, "speed": {}}',
}
_OTHERS = tuple(_RUN)
RUN = [
    *_cases("file of a run", "run/verdict.json", _in_run, {**_RUN, **_VERDICTS}, works=(*_RUN, *_VERDICTS)),
    *_cases("file of a run", "run/config.yaml", _in_run, {
        **{f"config.yaml: {name}": content for name, content in {**_RUN, **_YAMLS}.items()
           if name in _RUN or "laughs" in name or "deep" in name},
    }, works=tuple(f"config.yaml: {name}" for name in {**_RUN, **_YAMLS}
                   if name in _RUN or "laughs" in name or "deep" in name)),
    *_cases("file of a run", "run/checkpoints/step=99.ckpt", _in_run, {
        f"last checkpoint: {name}": content for name, content in {**_RUN, **_CKPTS}.items() if content is not Path.mkdir
    }, works=tuple(f"last checkpoint: {name}" for name, content in {**_RUN, **_CKPTS}.items()
                   if content is not Path.mkdir)),
    *_cases("file of a run", "run/metrics.json", _in_run, {
        f"metrics.json: {name}": content for name, content in {**_RUN, **_VERDICTS}.items()
    }, works=tuple(f"metrics.json: {name}" for name in {**_RUN, **_VERDICTS})),
]  # fmt: skip

CASES: tuple[Case, ...] = (*DATA, *ADAPTER, *TOKENIZER, *CONFIG, *CHECKPOINT, *RUN)
