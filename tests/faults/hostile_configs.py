"""Hostile configs of training, also beside an adapter."""

from __future__ import annotations

import gzip
from pathlib import Path

from tests.faults.hostile_adapters import SLOW, generate_unrecorded
from tests.faults.hostile_cases import NO_FILES, Content, cases, fit, nested
from tests.faults.runs import Project


def _as_config(project: Project, folder: Path) -> list[str]:
    return [*fit(project, folder), "--config", str(folder / "hostile.yaml")]


_LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
YAMLS: dict[str, Content] = {
    "a billion laughs": _LAUGHS.encode(),
    "a billion laughs of mappings": b"a0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {x: *a%d, y: *a%d}\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
    "merges of merges": b"a0: &a0 {x: 1}\n"
    + b"".join(b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 60)),
    "an anchor within itself": b"model: &a [*a]\n",
    "a merge of itself": b"model: &a {<<: *a}\n",
    "brackets 100,000 deep": b"model: " + nested(100_000),
    "braces 20,000 deep": b"model: " + b"{a: " * 20_000 + b"1" + b"}" * 20_000,
    "dashes 50,000 deep": b"model: \n" + b"- " * 50_000,
    "indented 600 deep": b"\n".join(b" " * n + b"a:" for n in range(600)),
    "an integer of 200,000 digits": b"seed_everything: " + b"9" * 200_000,
    "a hexadecimal number of 200,000 digits": b"seed_everything: 0x" + b"f" * 200_000,
    "a key of 200,000 characters": b"k" * 200_000 + b": 1\n",
    "3000 unknown keys": b"".join(b"k%d: 1\n" % n for n in range(3000)),
    "3000 unknown keys of the model": b"model:\n" + b"".join(b"  k%d: 1\n" % n for n in range(3000)),
    "a line of 100 MB": b"model: " + b"a" * 100_000_000,
    "code": b"model: !!python/object/apply:os.system ['touch code-ran']\n",
    "a class of the standard library": b"trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: "
    b"[touch, code-ran]}}]}\n",
    "a thousand documents": b"--- {}\n" * 1000,
    "quotes without end": b'model: "' + b"a\\\n" * 100_000,
    "a directive of version 9": b"%YAML 9.9\n--- {}\n",
    "gzip": gzip.compress(b"model: {}"),
    "a deep value of a setting": b"model: {lora: {rank_pattern: " + b"{a: " * 45 + b"1" + b"}" * 45 + b"}}\n",
}
_INFINITE: dict[str, Content] = {"1e999": b"model: {optimization: {learning_rate: 1e999}}\n"}
_LONG_BASE: dict[str, Content] = {"a long base": b"model: {base: '" + b"a/" * 100_000 + b"'}\n"}
_SIXTIES: dict[str, Content] = {"sixty times sixty": b"seed_everything: " + b"1:" * 60_000 + b"1"}
_SLOW_LAYERS: dict[str, Content] = {
    f"slow target_modules {number}": b"model: {lora: {target_modules: '%s'}}\n" % text.encode()
    for number, text in enumerate(SLOW)
}
CONFIG = [
    *cases("training config", "hostile.yaml", _as_config, {**NO_FILES, **YAMLS}),
    *cases("training config", "hostile.yaml", _as_config, _INFINITE, named="model.optimization.learning_rate"),
    *cases("training config", "hostile.yaml", _as_config, _LONG_BASE, named="model.base"),
    *cases("training config", "hostile.yaml", _as_config, _SIXTIES, named="seed_everything"),
    *cases("training config", "hostile.yaml", _as_config, _SLOW_LAYERS, named="target_modules"),
    *cases("config beside an adapter", "config.yaml", generate_unrecorded, {**NO_FILES, **YAMLS}, works=(
        *(name for name in NO_FILES if name not in ("a tebibyte of zeros", "nothing but NULs")),
        "3000 unknown keys of the model", "a deep value of a setting")),
]  # fmt: skip
