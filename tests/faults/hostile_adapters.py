"""Hostile adapters: their configuration, weights and tokenizer."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.hostile_cases import NO_FILES, Content, cases, fit, huge, nested, pipe
from tests.faults.runs import Project


def generate(project: Project, folder: Path) -> list[str]:
    folder.mkdir()
    shutil.copytree(project.folder / "whole" / "run" / "adapter", folder / "adapter")
    return ["generate", "hello", "--adapter", str(folder / "adapter"), "--base", f"random:{project.folder / 'base'}",
            "--max_new_tokens", "2", "--stream", "false"]  # fmt: skip


def generate_unrecorded(project: Project, folder: Path) -> list[str]:
    """With an adapter as PEFT writes it: its run's config says what it was trained on."""
    from safetensors.torch import load_file, save_file

    arguments = generate(project, folder)
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


SLOW = (r"((.+)+)+X", r"(.*)*(.*)*(.*)*(.*)*=", r"^(([a-z_.0-9])+.)+[A-Z]([a-z])+$")
_LARGE = (
    "((((a{1,99}){1,99}){1,99}){1,99}){1,99}",
    "(" * 5000 + ")" * 5000,
    "|".join(["x"] * 1_000_000),
    "a" * 1_000_000,
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
    *cases("adapter_config.json", "adapter/adapter_config.json", generate, {
        **NO_FILES,
        **_expressions(SLOW, "slow"),
        **_expressions(_LARGE, "large"),
        **{f"nested {depth} deep": _raw_config(b"auto_mapping", nested(depth)) for depth in (900, 990, 1_000_000)},
        **{f"{name} nested 990 deep": _raw_config(name.encode(), nested(990))
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
        "a million keys": json.dumps({f"c{number}": "x" for number in range(1_000_000)}).encode(),
        "a value of 15 MB that is not known": _config(a_new_field="x" * 15_000_000),
        "a base of a megabyte": _config(base_model_name_or_path="x/" * 500_000),
        "gzip of adapter_config.json": gzip.compress(_config()),  # type: ignore[arg-type]
    }, named="adapter"),
    *cases("weights", "adapter/adapter_model.safetensors", generate, {
        **NO_FILES,
        "a header of 2**63 bytes": _header(b"{}", 1 << 63),
        "a header of 2**64 - 1 bytes": _header(b"{}", (1 << 64) - 1),
        "a header of the whole file and more": _header(b"{}" + b" " * 100, 1000),
        "a header of 90 MB of spaces": _header(b"{}" + b" " * 90_000_000),
        "a header 1,000,000 deep": _header(b'{"x":' + nested(1_000_000) + b"}"),
        "a header 900 deep": _header(b'{"__metadata__":' + nested(900) + b"}"),
        "100,000 tensors": _header(
            b"{" + b",".join(_entry("[0]", 0, 0, name=f"t{n}") for n in range(100_000)) + b"}"),
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
    from lit_lora.base.load import load_tokenizer

    arguments = fit(project, folder, data__tokenizer=str(folder / "tokenizer"))
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
    from lit_lora.base.load import load_tokenizer

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
    "a power tower": "{{ 9 ** (9 ** 9) }}",
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


_SLOW_ON_ROWS = "((a|s|y|a|s|y| |[0-9]|[0-9])+)+b"


def _slow_splits(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": _SLOW_ON_ROWS}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def _slow_replaces(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": _SLOW_ON_ROWS}, "content": ""}


def _growing_replaces(content: dict[str, Any]) -> None:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 40}


TOKENIZER = [
    *cases("tokenizer", "tokenizer/tokenizer_config.json", _with_tokenizer, {
        **{name: content for name, content in NO_FILES.items() if name != "a link to itself"},
        "nested 1,000,000 deep": b'{"x": %s}' % nested(1_000_000),
        "nested 990 deep": b'{"x": %s}' % nested(990),
        "a length of a million digits": b'{"model_max_length": %s}' % (b"9" * 1_000_000),
        "a class of someone": _changed(lambda content: content.update(tokenizer_class="os.system")),
    }, named="tokenizer", works=("a class of someone",)),
    *cases("tokenizer", "tokenizer/chat_template.jinja", _with_tokenizer, {
        f"template: {name}": text.encode() for name, text in _TEMPLATES.items()
    }, named="tokenizer"),
    *cases("tokenizer", "tokenizer/tokenizer.json", _with_tokenizer, {
        "a pipe for tokenizer.json": pipe,
        "a tebibyte for tokenizer.json": huge,
        "tokenizer.json nested 1,000,000 deep": b'{"x": %s}' % nested(1_000_000),
        "an expression that is slow at splitting": _changed(_slow_splits),
        "an expression that is slow at replacing": _changed(_slow_replaces),
        "a text that grows": _changed(_growing_replaces),
        "a token of number 2**63": _changed(
            lambda content: content["added_tokens"].append({**content["added_tokens"][0], "id": 1 << 63})),
        "no model": _changed(lambda content: content.pop("model")),
        "a list": b"[]",
    }, named="tokenizer"),
]  # fmt: skip
