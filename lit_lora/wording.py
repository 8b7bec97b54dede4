"""How a message names a setting: as its reader writes it.

One message is read on several surfaces. In Python a setting is an argument, ``max_length=512``; to ``lit-lora fit`` it
is a key of YAML and an option, ``--data.max_length 512``; ``lit-lora evaluate`` may call it ``--max_length``, or not
have it. Code names settings by their key for ``fit``; the command line says once whom it speaks to.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

_UNSET: Any = object()
_options: Collection[str] | None = None
_is_command_line = False


@contextmanager
def for_command_line(options: Collection[str] | None = None) -> Iterator[None]:
    """Word the messages within for a command line.

    Args:
        options: what the verb has; None for the verbs that have all settings by their keys.
    """
    global _is_command_line, _options
    before = _is_command_line, _options
    _is_command_line, _options = True, options
    try:
        yield
    finally:
        _is_command_line, _options = before


def setting(key: str, value: Any = _UNSET) -> str:
    """A setting, or its assignment, for whoever reads it.

    Args:
        key: as for ``fit``.
        value: to set it to.
    """
    if not _is_command_line:
        name = key.rpartition(".")[2]
        return name if value is _UNSET else f"{name}={value!r}"
    if _options is None:
        return key if value is _UNSET else f"--{key} {_as_word(value)}"
    name = key.partition(".")[2] or key
    return f"--{name}" if value is _UNSET else f"--{name} {_as_word(value)}"


def advice(text: str, key: str, value: Any = _UNSET, *, otherwise: str) -> str:
    """A sentence about a setting, where there is such a setting.

    Args:
        text: with ``{}`` for the setting.
        key: as for ``fit``.
        value: to set it to.
        otherwise: what to say to a verb that does not have the setting.
    """
    name = key.partition(".")[2].partition(".")[0]
    if _is_command_line and _options is not None and name not in _options:
        return otherwise
    return text.replace("{}", setting(key, value))


def in_words_of(*, python: str, command_line: str) -> str:
    """One of two sentences, where what to do differs and not only its name."""
    return command_line if _is_command_line else python


def _as_word(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
