"""A config file of ``fit`` with a comment on each setting that was chosen for its reader."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

_WIDTH = 110
"""Of a line of a comment."""
_INDENT = "  "


class Choice(NamedTuple):
    """A setting by its key, and why it is as it is."""

    key: str
    value: Any
    reason: str = ""
    """Empty for what its reader has chosen."""


def commented(choices: Iterable[Choice], header: Sequence[str]) -> str:
    """The settings as YAML, in groups, each with its reason above it.

    Args:
        choices: in the order in which they are to stand; groups stand where their first setting does.
        header: lines of comment for the top.
    """
    groups: dict[str, Any] = {}
    for choice in choices:
        *path, name = choice.key.split(".")
        within = groups
        for part in path:
            within = within.setdefault(part, {})
        within[name] = choice
    return "\n".join([*(f"# {line}" for line in header), *_lines(groups, "")]) + "\n"


def _lines(group: dict[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for name, entry in group.items():
        if not isinstance(entry, Choice):
            lines += [f"{indent}{name}:", *_lines(entry, indent + _INDENT)]
            continue
        lines += [f"{indent}# {line}" for line in textwrap.wrap(entry.reason, _WIDTH, break_on_hyphens=False)]
        text = yaml.safe_dump({name: entry.value}, sort_keys=False, allow_unicode=True, width=10_000)
        lines += [indent + line for line in text.rstrip("\n").split("\n")]
    return lines
