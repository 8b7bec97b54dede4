"""YAML as a config means it: each key once, nothing hidden, nothing that runs code, nothing that grows.

PyYAML takes the last of two equal keys in silence, builds a text of a kilobyte into billions of values through aliases,
and follows YAML 1.1, where ``no`` is false, ``010`` is 8 and ``1:30`` is 90. Here the core schema of YAML 1.2 holds:
``true``, ``false``, ``null``, numbers as every other tool reads them (``2e-4`` too), and all else is text.

jsonargparse reads files, values on the command line and nested files through one loader, which is this one for all
verbs (:func:`install`); what lit_lora reads itself goes through it as well.
"""

from __future__ import annotations

import os
import re
import select
import stat
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml import YAMLError
from yaml.nodes import MappingNode, Node, ScalarNode

MODE = "strict_yaml"
"""The parser mode of jsonargparse, once installed."""

PIPE_LIMIT_S = 10.0
MAX_CHARACTERS = 256 * 1024
MAX_DEPTH = 50
MAX_NODES = 20_000
"""Values of a file with every alias written out."""

_TAG = "tag:yaml.org,2002:"


class StrictError(YAMLError):
    """YAML that is well-formed and is refused all the same."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str, Any]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}
        self._total = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Like PyYAML's, within limits: an alias counts as all that it stands for."""
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise StrictError(f"line {line}: *{event.anchor} stands inside of what it names, without end")
            self._count(self._sizes[id(node)], line)
            return node
        if (tag := getattr(event, "tag", None)) and tag not in self.yaml_constructors:
            shown = tag.replace(_TAG, "!!")
            raise StrictError(f"line {line}: the tag {shown} is refused: a config holds text, numbers, lists, mappings")
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise StrictError(f"line {line}: nested more than {MAX_DEPTH} deep")
        before = self._total
        self._count(1, line)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if isinstance(node, MappingNode):
            _check_keys(node)
        self._sizes[id(node)] = self._total - before
        return node

    def _count(self, size: int, line: int) -> None:
        self._total += size
        if self._total > MAX_NODES:
            raise StrictError(f"line {line}: more than {MAX_NODES:,} values with each *alias written out")


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _name in ("null", "bool", "float", "str", "seq", "map"):
    _Loader.add_constructor(f"{_TAG}{_name}", getattr(yaml.SafeLoader, f"construct_yaml_{_name}"))
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: _integer(loader.construct_scalar(node)))
for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
    ("merge", "<<", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), list(_first))
    _Dumper.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), list(_first))


def _check_keys(node: MappingNode) -> None:
    seen: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise StrictError(f"line {line}: expected a name before the colon, got a list or mapping")
        name = (key.tag, key.value)
        if name in seen:
            raise StrictError(f"line {line}: {key.value!r} is there already, in line {seen[name]}: put both into one")
        seen[name] = line


def _integer(text: str) -> int:
    digits = text.lstrip("+-")
    if len(digits) > 20:
        raise StrictError(f"an integer of {len(digits)} digits")
    return int(text, 0) if digits.startswith(("0o", "0x")) else int(text)


def parse(text: str) -> Any:
    """The values that a text stands for.

    Raises:
        YAMLError: if it is no YAML.
        StrictError: a kind of it, for YAML that is refused; both say in which line.
    """
    if len(text) > MAX_CHARACTERS:
        raise StrictError(f"{len(text):,} characters, expected at most {MAX_CHARACTERS:,}")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except ValueError as error:
        raise StrictError(str(error)) from error
    finally:
        loader.dispose()


def read(path: Path) -> Any:
    """The values in a file.

    Raises:
        ValueError: in one line that names the file and what to do, where it cannot be read as YAML.
        FileNotFoundError: if it is not there.
        OSError: if it cannot be opened.
    """
    content = _content(path)
    try:
        return parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise ValueError(f"{path} line {line}: not UTF-8 (byte 0x{byte:02x}): save it as UTF-8") from None
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {reason(error)}") from error


def _content(path: Path) -> bytes:
    """As much of a file as a config may have; of a pipe too, if somebody writes to it."""
    # Opening a pipe would wait for somebody to write to it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            if not select.select([file], [], [], PIPE_LIMIT_S)[0]:
                raise ValueError(f"{path} is a pipe to which nobody writes")
            os.set_blocking(file.fileno(), True)
        return file.read(4 * MAX_CHARACTERS + 1)


def dump(data: Any) -> str:
    """Values as a text that :func:`parse` reads back the same, and readers of YAML 1.1 too."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def reason(error: YAMLError) -> str:
    """What PyYAML says over five lines, in one."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    if "'\\t'" in problem:
        problem = "a tab cannot indent: use spaces"
    return f"line {mark.line + 1}: {problem}"


def _load(text: str) -> Any:
    """For jsonargparse: a name with a colon after it, and names in braces, are text."""
    value = parse(text)
    if isinstance(value, dict) and value and all(v is None for v in value.values()):
        line = text.strip()
        if "\n" not in line and (line.endswith(":") or ":" not in line):
            return text
    return value


def install() -> str:
    """Make jsonargparse know this loader.

    Returns:
        The parser mode to use it with.
    """
    from jsonargparse import set_dumper, set_loader

    set_loader(MODE, _load, exceptions=(YAMLError,))
    set_dumper(MODE, dump)
    return MODE
