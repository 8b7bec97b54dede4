"""Private names of other libraries are used by the table of ``private_apis.py``, and in no other place."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.private_apis import PRIVATE, Private

ROOT = Path(__file__).resolve().parent.parent
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("lit_lora", "callbacks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PUBLIC = {"_asdict", "_replace", "_fields", "_exit"}
"""Of Python's own library, which documents them."""
NO_NAMES = {"_token_id", "_token_index", "_token_ids", "_loss", "_perplexity", "_peak_mib", "_svd"}
"""Strings that are ends of names."""


def _is_private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and name not in PUBLIC


def _own_names(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


OWN = set().union(*map(_own_names, TREES.values()))
LISTED = {row.symbol for row in PRIVATE}


def _private_uses(tree: ast.AST) -> Iterator[str]:
    """Symbols, as in the table."""
    known: dict[str, str] = {}  # a name in this file -> what it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    yield from (name for name in known.values() if _is_private_of_others(name))
    parts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    own = _own_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if _is_private(text):
                if text not in NO_NAMES | OWN or f".{text}" in LISTED:
                    yield f".{text}"
            case ast.Attribute(attr=name):
                written = ast.unparse(node)
                root, _, rest = written.partition(".")
                if root in known and re.fullmatch(r"[\w.]+", rest):
                    full = f"{root if known[root].startswith(f'{root}.') else known[root]}.{rest}"
                    if id(node) not in parts and _is_private_of_others(full):
                        yield full
                elif _is_private(name):
                    of_self = ast.unparse(node.value) in ("self", "cls", "super()")
                    if name not in OWN if of_self else (f".{name}" in LISTED or name not in own):
                        yield f".{name}"


def _is_private_of_others(dotted: str) -> bool:
    return not dotted.startswith("lit_lora.") and any(map(_is_private, dotted.split(".")))


USES: dict[str, set[str]] = {}
for _path, _tree in TREES.items():
    for _symbol in _private_uses(_tree):
        USES.setdefault(_symbol, set()).add(_path)


def test_the_table_is_whole_and_has_no_row_too_many() -> None:
    assert len(TREES) > 100
    assert len(LISTED) == len(PRIVATE)
    used = {(symbol, path) for symbol, paths in USES.items() for path in paths}
    listed = {(row.symbol, path) for row in PRIVATE for path in row.users.split()}
    assert sorted(used - listed) == [], "used, and not in the table"
    assert sorted(listed - used) == [], "in the table, and not used"


def test_each_row_says_why_and_until_when() -> None:
    assert all(row.why and row.until and (row.of or not row.symbol.startswith(".")) for row in PRIVATE)


def _found(dotted: str) -> Any:
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(dotted)


@pytest.mark.parametrize("row", PRIVATE, ids=lambda row: row.symbol)
def test_each_is_there_in_what_is_installed(row: Private) -> None:
    if row.symbol.startswith("liger_kernel"):
        pytest.importorskip("liger_kernel", reason="an extra for CUDA")
    if not row.of:
        assert _found(row.symbol) is not None
        return
    owner, name = _found(row.of), row.symbol.removeprefix(".")
    assert hasattr(owner, name) or re.search(rf"\b{name}\b", inspect.getsource(owner)), f"{row.of} has no {name}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import torch\ntorch._C._x()", "torch._C._x"),
        ("from torch import nn\nnn.m._B", "torch.nn.m._B"),
        ("from transformers.x import _y", "transformers.x._y"),
        ("import datasets._z", "datasets._z"),
        ("model._never_heard_of", "._never_heard_of"),
        ("self._of_a_base_class()", "._of_a_base_class"),
        ("getattr(x, '_hidden')", "._hidden"),
    ],
)
def test_a_use_of_any_form_is_found(code: str, expected: str) -> None:
    assert expected in set(_private_uses(ast.parse(code)))
