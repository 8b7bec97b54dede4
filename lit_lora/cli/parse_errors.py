"""What the parser has against a value, in one line.

jsonargparse tries a value as each type that a setting can be, and reports all that failed, over ten lines and with the
types in Python's words; the reason that helps is one of them, seldom the last.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from lit_lora.files.meant import closest, did_you_mean

_PLAIN_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "dict": "settings by name",
    "list": "a list",
    "Iterable": "a list",
}


def reason(message: str, *, classes: Sequence[type] = (), known: Iterable[str] = (), key: str = "") -> str:
    """Why a value is refused.

    Args:
        message: the parser's report.
        classes: that the value names: their arguments may be the mistyped ones.
        known: names of classes that the setting can be.
        key: of the setting, for advice.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    found = _first(r"Option '([^']+)' is not accepted", lines)
    if found and (not classes or any(found[1] not in _arguments(kind) for kind in classes)):
        return _no_argument(found[1], classes)
    if found := _first(r"the following arguments are required: (.+)", lines):
        if not classes:
            return f"missing: {found[1]}"
        return f"{classes[-1].__name__} needs {' and '.join(f'{key}.{name}' for name in found[1].split(', '))}"
    if nested := _nested(message, key):
        return f"{nested[0]}: {reason(nested[1])}"
    if found := _first(r"Multiple subclasses with name .*", lines):
        return found[0].rstrip(".")
    if found := _first(r"Import path (\S+) does not correspond to a subclass of (\w+)", lines):
        return f"{found[1]} is no {found[2]}"
    if found := _first(r"Problem with given class_path '([^']*)'", lines):
        at = next(index for index, line in enumerate(lines) if found[0] in line)
        why = lines[at + 1].rstrip(".") if at + 1 < len(lines) else "it cannot be imported"
        return f"no class {found[1]!r} ({why}){_similar(found[1], known)}"
    if known and (found := _first(r"Expected a dot import path string: (.*)", lines)):
        return f"no class {found[1]!r}{_similar(found[1], known)}"
    if known and _first(r"Not a valid subclass of (\w+)", lines):
        return "expected a class by name, or class_path with init_args"
    return _expected(lines) or " ".join(lines[-2:]).rstrip(".")


def subclasses(typehint: Any) -> list[type]:
    """All classes that a value of this type can name, as far as they are imported."""
    found: list[type] = []
    for base in bases(typehint):
        waiting = [base]
        while waiting:
            kind = waiting.pop()
            if kind not in found:
                found.append(kind)
                waiting += kind.__subclasses__()
    return found


def bases(typehint: Any) -> Iterable[type]:
    """The classes in a type, but for those of Python itself."""
    if isinstance(typehint, (list, tuple)):
        for part in typehint:
            yield from bases(part)
    elif parts := get_args(typehint):
        yield from bases(parts)
    elif isinstance(typehint, type) and typehint.__module__ not in ("builtins", "collections.abc", "types"):
        yield typehint


def _first(pattern: str, lines: list[str]) -> re.Match[str] | None:
    return next((found for line in lines if (found := re.search(pattern, line))), None)


def _nested(message: str, key: str) -> tuple[str, str] | None:
    """The argument inside of the value that was refused, and what is said about it."""
    lines = message.splitlines()
    for index, line in enumerate(lines):
        found = re.match(r'\s*(?:- )?Parser key "([^"]+)":', line)
        if found is None or found[1] == key or index == 0:
            continue
        rest = lines[index + 1 :]
        end = next((n for n, after in enumerate(rest) if after.strip() and _indent(after) <= _indent(line)), None)
        return found[1], "\n".join(rest[:end])
    return None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" -"))


def _no_argument(name: str, classes: Sequence[type]) -> str:
    without = [kind for kind in classes if name not in _arguments(kind)] or list(classes)
    if not without:
        return f"no argument {name!r}"
    known = _arguments(without[-1])
    close = closest(name, known)
    hint = f", {did_you_mean(close)}" if close else f"; it has {', '.join(known)}"
    return f"{without[-1].__name__} has no argument {name!r}{hint}"


def _arguments(kind: type) -> list[str]:
    found: dict[str, None] = {}
    for parent in kind.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(vars(parent)["__init__"]).parameters.values()
            plain = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            found |= dict.fromkeys(p.name for p in plain if p.name != "self")
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(found)


def _similar(name: str, known: Iterable[str]) -> str:
    close = closest(name.rpartition(".")[2], known, cutoff=0.7)
    return f", {did_you_mean(close)}" if close else ""


def _expected(lines: list[str]) -> str:
    found = [match[1] for line in lines if (match := re.search(r"Expected an? (.+?)(?:\. Got value.*)?$", line))]
    plain = [_plain(text) for text in found if not text.startswith(("path but", "dot import"))]
    return f"expected {' or '.join(dict.fromkeys(plain))}" if plain else ""


def _plain(text: str) -> str:
    if literal := re.match(r"typing\.Literal\[(.*)\]", text):
        return f"one of {literal[1]}".replace("'", "")
    name = (re.match(r"<class '(?:.*\.)?(\w+)'>", text) or [text, text])[1]
    return _PLAIN_TYPES.get(name, name)
