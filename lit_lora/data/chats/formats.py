"""From rows to examples: Alpaca, ShareGPT, messages, prompt/completion and plain text become one internal form.

An example is either a conversation (see ``conversation.py``) or a text. Whatever cannot be one is named by line in one
report; by default nothing is trained on data that is partly broken. What of a row is not used is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lit_lora.data.chats.conversation import (
    BadRow,
    Conversation,
    checked_text,
    read_conversation,
    read_options,
    read_tools,
)
from lit_lora.data.chats.pairs import is_pair, refusal
from lit_lora.data.rows.sources import Problems, Row, shown, shown_names
from lit_lora.files.meant import closest, did_you_mean
from lit_lora.wording import advice, setting

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
    """Where it came from, see :class:`lit_lora.data.rows.sources.Row`."""
    content: Conversation | str
    tools: list[Any] | None = None
    """JSON schemas of the tools that the assistant may call."""
    options: dict[str, Any] | None = None
    """Further variables for the chat template, from a column ``chat_template_kwargs``."""
    digest: bytes = b""
    """Of all but the line: equal examples have equal ones."""


class Layout(NamedTuple):
    """What the columns of a source mean: settled once, on its first row."""

    format: str
    """A name from :data:`FORMATS`."""
    columns: dict[str, str]
    """Field of the format -> column; optional fields are there although no row may have them."""


@dataclass
class Examples:
    """The examples of a source, and what was left out of it."""

    items: list[Example] = field(default_factory=list)
    format: str = ""
    num_rows: int = 0
    problems: Problems = field(default_factory=lambda: Problems(""))

    @property
    def num_duplicates(self) -> int:
        """Examples that are equal to an earlier one; they are kept."""
        return len(self.items) - len({example.digest for example in self.items})


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise BadRow(f"no field {name!r}, got {shown_names(sorted(fields))}")
    return checked_text(fields[name], f"field {name!r}")


def _optional_text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return checked_text(value, f"field {name!r}")


def _joined(fields: Mapping[str, Any], first: str, second: str) -> str:
    """A field, and after a blank line one that need not be there."""
    text, more = _text(fields, first), _optional_text(fields, second)
    return f"{text}\n\n{more}" if more else text


def _with_system(fields: Mapping[str, Any], turns: Conversation) -> Conversation:
    """``turns`` after the text of the field ``system``, where it is there."""
    system = _optional_text(fields, "system")
    if not system:
        return turns
    if turns and turns[0]["role"] in ("system", "developer"):
        if turns[0]["content"].strip() == system.strip():
            return turns
        raise BadRow("field 'system' has a system message, and the conversation begins with another one")
    return [{"role": "system", "content": system}, *turns]


def from_alpaca(fields: Mapping[str, Any]) -> Conversation:
    """``instruction``, ``output``, and where present ``input`` (appended to the instruction) and ``system``."""
    question = {"role": "user", "content": _joined(fields, "instruction", "input")}
    return _with_system(fields, [question, {"role": "assistant", "content": _text(fields, "output")}])


def from_prompt_completion(fields: Mapping[str, Any]) -> Conversation:
    """``prompt``, ``completion``, and where present ``context`` (appended to the prompt) and ``system``.

    Prompt and completion may be lists of turns; those of the prompt are not learned.
    """
    if isinstance(fields.get("prompt"), list) or isinstance(fields.get("completion"), list):
        prompt, completion = (
            fields[name] if isinstance(fields[name], list) else [{"role": role, "content": _text(fields, name)}]
            for name, role in (("prompt", "user"), ("completion", "assistant"))
        )
        turns = read_conversation([*prompt, *completion], "prompt and completion")
        for turn in turns[: len(prompt)]:
            if turn["role"] == "assistant":
                turn["weight"] = 0.0
        return _with_system(fields, turns)
    question = {"role": "user", "content": _joined(fields, "prompt", "context")}
    return _with_system(fields, [question, {"role": "assistant", "content": _text(fields, "completion")}])


def from_messages(fields: Mapping[str, Any]) -> Conversation:
    """``messages``: a list of objects with ``role`` and ``content``, and where present ``system``."""
    return _with_system(fields, read_conversation(fields["messages"], "messages"))


def from_sharegpt(fields: Mapping[str, Any]) -> Conversation:
    """``conversations``: a list of objects with ``from`` and ``value``, and where present ``system``."""
    return _with_system(fields, read_conversation(fields["conversations"], "conversations", "from", "value"))


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
_OF_CHATS = ("system", "tools", "chat_template_kwargs")
OPTIONAL = {
    "messages": _OF_CHATS,
    "sharegpt": _OF_CHATS,
    "alpaca": ("input", *_OF_CHATS),
    "prompt_completion": ("context", *_OF_CHATS),
    "text": (),
}


def resolve_columns(names: Iterable[str], format: str, columns: Mapping[str, str] | None) -> Layout:
    """Settle the format and which column holds which of its fields.

    Args:
        names: the columns that are there.
        format: a name from :data:`FORMATS`, or "auto".
        columns: field of the format -> column, where they differ.

    Returns:
        The format, and the column of each of its fields.

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
            return Layout(candidate, mapping)
    wanted = "; ".join(f"{name} ({', '.join(REQUIRED[name])})" for name in candidates)
    given = f" with {setting('data.columns', columns)}" if columns else ""
    example = {"prompt": "question", "completion": "answer"}
    fix = advice("name them, for example {}", "data.columns", example, otherwise="rename the columns of the file")
    what = "any format" if format == "auto" else f"the format {format!r}"
    raise ValueError(f"the columns {shown_names(available)}{given} do not fit {what}; expected {wanted}: {fix}")


def _fit(format: str, available: list[str], columns: dict[str, str]) -> dict[str, str] | None:
    """Field -> column for one format, or None where a required field has no column."""
    mapping = {name: columns.get(name, name) for name in REQUIRED[format]}
    pairs = PROMPT_COMPLETION_NAMES if format == "prompt_completion" and not mapping.keys() & columns.keys() else ()
    if not set(mapping.values()) <= set(available):
        pair = next((pair for pair in pairs if set(pair) <= set(available)), None)
        if pair is None:
            return None
        mapping = dict(zip(mapping, pair, strict=True))
    # Rows that have an optional field may come after rows that have not.
    others = {name: columns.get(name, name) for name in OPTIONAL[format]}
    return mapping | {name: column for name, column in others.items() if column not in mapping.values()}


def layout_of(row: Row, source: str, format: str = "auto", columns: Mapping[str, str] | None = None) -> Layout:
    """Settle what the columns of a source mean, on its first row.

    Args:
        row: the first.
        source: its name, for the message.
        format: a name from :data:`FORMATS`, or "auto".
        columns: field of the format -> column, where they differ.

    Raises:
        ValueError: if the columns fit no format, or hold preference pairs.
    """
    try:
        if is_pair(row.fields, format, columns):
            raise ValueError(refusal(row.fields, columns))
        return resolve_columns(row.fields, format, columns)
    except ValueError as error:
        raise ValueError(f"{source}:{row.line}: {error}") from error


def parse_examples(
    rows: Iterable[Row], problems: Problems, layout: Layout, *, ignore: Collection[str] = ()
) -> list[Example]:
    """Turn rows into examples: any rows of a source, in any process.

    Args:
        rows: as from :func:`lit_lora.data.rows.sources.read_rows`.
        problems: takes rows that cannot be examples, and counts the columns that are not used.
        layout: from :func:`layout_of`.
        ignore: columns that need not be used.
    """
    examples = []
    used = {*layout.columns.values(), *ignore}
    for row in rows:
        for name in row.fields.keys() - used:
            if row.fields[name] is not None:
                problems.note(f"column {shown(name)} is not used")
        fields = {name: row.fields[column] for name, column in layout.columns.items() if column in row.fields}
        missing = [layout.columns[name] for name in REQUIRED[layout.format] if name not in fields]
        try:
            if missing:
                raise BadRow(f"no field {missing[0]!r}, got {shown_names(sorted(row.fields))}")
            content = FORMATS[layout.format](fields)
            tools = read_tools(fields.get("tools"))
            options = read_options(fields.get("chat_template_kwargs"))
            described = json.dumps([content, tools, options], default=str).encode()
        except (BadRow, RecursionError) as error:
            problems.add(row.line, str(error) if isinstance(error, BadRow) else "nested too deeply")
            continue
        digest = hashlib.blake2b(described, digest_size=16).digest()
        examples.append(Example(row.line, content, tools, options, digest))
    return examples
