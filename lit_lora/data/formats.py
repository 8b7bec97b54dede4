"""From rows to examples: Alpaca, ShareGPT, messages, prompt/completion and plain text become one internal form.

An example is either a conversation (a list of ``{"role", "content"}``) or a text. Whatever cannot be one is named by
line in one report; by default nothing is trained on data that is partly broken. Left out: tool calls and images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lit_lora.data.sources import Problems, Row, shown, shown_names
from lit_lora.files.meant import closest, did_you_mean
from lit_lora.wording import advice, setting

Conversation = list[dict[str, str]]
"""Turns: an optional system message, then user and assistant in turn."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
PROMPT_COMPLETION_NAMES = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "response"),
    ("input", "output"),
)


class Example(NamedTuple):
    """One training example before tokenization."""

    line: int
    """Where it came from, see :class:`lit_lora.data.sources.Row`."""
    content: Conversation | str


class BadRow(ValueError):
    """A row that cannot be an example; the message says why."""


@dataclass
class Examples:
    """The examples of a source, and what was left out of it."""

    items: list[Example] = field(default_factory=list)
    format: str = ""
    num_rows: int = 0
    num_duplicates: int = 0
    """Examples that are equal to an earlier one; they are kept."""
    problems: Problems = field(default_factory=lambda: Problems(""))


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise BadRow(f"no field {name!r}, got {shown_names(sorted(fields))}")
    return _checked(fields[name], f"field {name!r}")


def _checked(value: Any, what: str) -> str:
    if value is None:
        raise BadRow(f"{what} is null")
    if not isinstance(value, str):
        raise BadRow(f"{what} is of type {type(value).__name__}, expected text")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{what} holds half a surrogate pair, which is no character") from None
    return value


def _optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return _checked(value, f"field {name!r}")


def _turns(fields: Mapping[str, Any], user: str, assistant: str) -> Conversation:
    system = _optional_text(fields, "system")
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def from_alpaca(fields: Mapping[str, Any]) -> Conversation:
    """``instruction``, ``output``, and where present ``input`` (appended to the instruction) and ``system``."""
    extra = _optional_text(fields, "input")
    instruction = _text(fields, "instruction")
    return _turns(fields, f"{instruction}\n\n{extra}" if extra else instruction, _text(fields, "output"))


def from_prompt_completion(fields: Mapping[str, Any]) -> Conversation:
    """``prompt``, ``completion`` and where present ``system``."""
    return _turns(fields, _text(fields, "prompt"), _text(fields, "completion"))


def from_messages(fields: Mapping[str, Any]) -> Conversation:
    """``messages``: a list of objects with ``role`` and ``content``."""
    return _conversation(fields, "messages", "role", "content")


def from_sharegpt(fields: Mapping[str, Any]) -> Conversation:
    """``conversations``: a list of objects with ``from`` and ``value``."""
    return _conversation(fields, "conversations", "from", "value")


def from_text(fields: Mapping[str, Any]) -> str:
    """``text``: all of it is trained on."""
    return _text(fields, "text")


FORMATS: dict[str, Callable[[Mapping[str, Any]], Conversation | str]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "prompt_completion": from_prompt_completion,
    "text": from_text,
}
"""Format name -> function of a row; in the order in which they are detected."""

REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL = {"alpaca": ("input", "system"), "prompt_completion": ("system",)}


def _conversation(fields: Mapping[str, Any], name: str, role_key: str, content_key: str) -> Conversation:
    if name not in fields:
        raise BadRow(f"no field {name!r}, got {shown_names(sorted(fields))}")
    value = fields[name]
    if not isinstance(value, list):
        raise BadRow(f"field {name!r} is {'null' if value is None else type(value).__name__}, expected a list of turns")
    conversation: Conversation = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or role_key not in turn or content_key not in turn:
            got = shown_names(sorted(turn)) if isinstance(turn, Mapping) else type(turn).__name__
            raise BadRow(f"turn {number} of {name!r} needs {role_key!r} and {content_key!r}, got {got}")
        role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise BadRow(f"turn {number} has the unknown role {shown(turn[role_key])}, expected one of {sorted(ROLES)}")
        content = _checked(turn[content_key], f"{content_key!r} of turn {number} ({turn[role_key]})")
        conversation.append({"role": role, "content": content})
    _check_order(conversation)
    return conversation


def _check_order(conversation: Conversation) -> None:
    roles = [turn["role"] for turn in conversation]
    if "assistant" not in roles:
        raise BadRow(f"no assistant turn to learn from, got {shown_names(roles) if roles else 'no turns'}")
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:], start=first + 1):
        expected = "user" if (number - first) % 2 else "assistant"
        if role == "system":
            raise BadRow(f"turn {number} is a system message, which may only be the first")
        if role != expected:
            raise BadRow(f"roles out of order: turn {number} is {role!r}, expected {expected!r}")


def resolve_columns(names: Iterable[str], format: str, columns: Mapping[str, str] | None) -> tuple[str, dict[str, str]]:
    """Settle the format and which column holds which of its fields.

    Args:
        names: the columns that are there.
        format: a name from :data:`FORMATS`, or "auto".
        columns: field of the format -> column, where they differ.

    Returns:
        The format's name, and a mapping from field to column.

    Raises:
        ValueError: if the columns fit no format, or a named column is not there.
    """
    available = list(names)
    columns = dict(columns or {})
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown, expected 'auto' or one of {', '.join(FORMATS)}")
    for name, column in columns.items():
        if column not in available:
            close = closest(column, available)
            hint = f": {did_you_mean(close)}" if close else ""
            raise ValueError(
                f"columns maps {name!r} to {column!r}, but the data has the columns {shown_names(available)}{hint}"
            )
    candidates = list(FORMATS) if format == "auto" else [format]
    for candidate in candidates:
        mapping = _fit(candidate, available, columns)
        if mapping is not None and columns.keys() <= mapping.keys():
            return candidate, mapping
    wanted = "; ".join(f"{name} ({', '.join(REQUIRED[name])})" for name in candidates)
    given = f" with {setting('data.columns', columns)}" if columns else ""
    example = {"prompt": "question", "completion": "answer"}
    fix = advice("name them, for example {}", "data.columns", example, otherwise="rename the columns of the file")
    what = "any format" if format == "auto" else f"the format {format!r}"
    raise ValueError(f"the columns {shown_names(available)}{given} do not fit {what}; expected {wanted}: {fix}")


def _fit(format: str, available: list[str], columns: dict[str, str]) -> dict[str, str] | None:
    """Field -> column for one format, or None where a required field has no column."""
    names = [*REQUIRED[format], *OPTIONAL.get(format, ())]
    mapping = {name: columns.get(name, name) for name in names if name in columns or name in available}
    if all(name in mapping for name in REQUIRED[format]):
        return mapping
    if format == "prompt_completion" and not {"prompt", "completion"} & columns.keys():
        for prompt, completion in PROMPT_COMPLETION_NAMES:
            if prompt in available and completion in available:
                return mapping | {"prompt": prompt, "completion": completion}
    return None


def parse_examples(
    rows: Iterable[Row],
    problems: Problems,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Examples:
    """Turn rows into examples, settling the format on the first row.

    Args:
        rows: as from :func:`lit_lora.data.sources.read_rows`.
        problems: takes rows that cannot be examples.
        format: a name from :data:`FORMATS`, or "auto".
        columns: field of the format -> column, where they differ.
        limit: read only this many rows.

    Raises:
        ValueError: if the columns fit no format.
    """
    examples = Examples(problems=problems)
    mapping: dict[str, str] = {}
    seen: set[bytes] = set()
    for row in rows:
        if limit is not None and examples.num_rows >= limit:
            break
        if not mapping:
            try:
                examples.format, mapping = resolve_columns(row.fields, format, columns)
            except ValueError as error:
                raise ValueError(f"{problems.source}:{row.line}: {error}") from error
        examples.num_rows += 1
        fields = {name: row.fields[column] for name, column in mapping.items() if column in row.fields}
        missing = [mapping[name] for name in REQUIRED[examples.format] if name not in fields]
        try:
            if missing:
                raise BadRow(f"no field {missing[0]!r}, got {shown_names(sorted(row.fields))}")
            content = FORMATS[examples.format](fields)
        except BadRow as error:
            problems.add(row.line, str(error))
            continue
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()
        examples.num_duplicates += digest in seen
        seen.add(digest)
        examples.items.append(Example(row.line, content))
    return examples
