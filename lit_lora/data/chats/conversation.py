"""What people write as a conversation, brought into one form: OpenAI's messages, ShareGPT, tool calls, reasoning.

A turn stays a dict of plain types, with ``role`` and ``content`` (text, empty only beside tool calls or of a tool's
result) and where they are there ``reasoning_content``, ``tool_calls`` and ``weight``. Other keys stay as they are: the
chat template uses them or not. Nothing here knows of a template. Left out: images, audio and video.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lit_lora.data.rows.sources import shown, shown_names

Conversation = list[dict[str, Any]]
"""Turns, in the order of the conversation."""

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
    "environment": "tool",
}
WEIGHTS = {"weight": float, "loss_scale": float, "train": bool, "training": bool, "loss": bool}
"""Names under which a turn says whether it is learned, or how much, and the type of each."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a turn's reasoning comes; the first is the one that is kept."""

_TEXT_PARTS = {"text", "input_text", "output_text"}


class BadRow(ValueError):
    """A row that cannot be an example; the message says why."""


def checked_text(value: Any, what: str, *, may_be_empty: bool = False) -> str:
    """``value``, where it is text that can be tokenized.

    Raises:
        BadRow: naming it as ``what``.
    """
    if value is None:
        raise BadRow(f"{what} is null")
    if not isinstance(value, str):
        raise BadRow(f"{what} is of type {type(value).__name__}, expected text")
    if not may_be_empty and not value.strip():
        raise BadRow(f"{what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{what} holds half a surrogate pair, which is no character") from None
    return value


def read_conversation(value: Any, name: str, role_key: str = "role", content_key: str = "content") -> Conversation:
    """Bring a list of turns into the internal form.

    Args:
        value: of the field.
        name: of the field, for messages.
        role_key: where a turn says whose it is; "role" and "content" are understood too.
        content_key: where it says what.

    Raises:
        BadRow: naming the turn.
    """
    if not isinstance(value, list):
        raise BadRow(f"field {name!r} is {'null' if value is None else type(value).__name__}, expected a list of turns")
    conversation = [_turn(turn, number, name, role_key, content_key) for number, turn in enumerate(value, start=1)]
    roles = [turn["role"] for turn in conversation]
    if "assistant" not in roles:
        raise BadRow(f"no assistant turn to learn from, got {shown_names(roles) if roles else 'no turns'}")
    return conversation


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a row: a list of JSON schemas, or JSON of one; None where there are none.

    Raises:
        BadRow: if it is neither.
    """
    tools = _decoded(value, "field 'tools'") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(f"field 'tools' is {shown(tools)}, expected a list of objects that describe tools, or JSON of one")
    # What some leave out, and transformers' templates go by.
    return [{"type": "function", "function": t} if "name" in t and "type" not in t else dict(t) for t in tools]


def read_options(value: Any) -> dict[str, Any] | None:
    """Further variables for the chat template: an object, or JSON of one; None where there are none.

    Raises:
        BadRow: if it is neither.
    """
    field = "field 'chat_template_kwargs'"
    options = _decoded(value, field) if isinstance(value, str) and value.strip() else value
    if not options:
        return None
    if not isinstance(options, Mapping):
        raise BadRow(f"{field} is {shown(options)}, expected an object of variables for the chat template")
    return dict(options)


def _turn(turn: Any, number: int, name: str, role_key: str, content_key: str) -> dict[str, Any]:
    if isinstance(turn, Mapping) and role_key not in turn and "role" in turn:
        role_key, content_key = "role", "content"
    given = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    has_calls = "tool_calls" in given or "function_call" in given
    if not isinstance(turn, Mapping) or role_key not in turn or (content_key not in turn and not has_calls):
        got = shown_names(sorted(turn)) if isinstance(turn, Mapping) else type(turn).__name__
        raise BadRow(f"turn {number} of {name!r} needs {role_key!r} and {content_key!r}, got {got}")
    given_role = turn[role_key]
    role = ROLES.get(given_role) if isinstance(given_role, str) else None
    if role is None:
        raise BadRow(f"turn {number} has the unknown role {shown(given_role)}, expected one of {sorted(ROLES)}")
    given.pop(role_key)
    content = given.pop(content_key, None)
    read: dict[str, Any] = {"role": role}
    where = f"of turn {number} ({given_role})"
    if given_role == "function_call":
        given["tool_calls"], content = _decoded(content, f"{content_key!r} {where}"), None
    if (reasoning := [given.pop(key) for key in REASONING if key in given]) and reasoning[0] != "":
        read["reasoning_content"] = checked_text(reasoning[0], f"the reasoning {where}", may_be_empty=True)
    if calls := _tool_calls(given, where):
        read["tool_calls"] = calls
    if isinstance(content, list):
        content = _joined(content, where)
    elif isinstance(content, Mapping) and role == "tool":
        content = json.dumps(content, ensure_ascii=False, default=str)
    may_be_empty = bool(calls) or role == "tool"
    text = "" if content is None and may_be_empty else content
    read["content"] = checked_text(text, f"{content_key!r} {where}", may_be_empty=may_be_empty)
    weight = _weight(given, where)
    if weight != 1:
        read["weight"] = weight
    return {**read, **{key: value for key, value in given.items() if key not in read}}


def _tool_calls(given: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Those of a turn, taken out of it, as transformers' templates expect them; arguments stay object or JSON."""
    calls = given.pop("tool_calls", None)
    legacy = given.pop("function_call", None)
    calls = [legacy] if legacy is not None and calls is None else calls
    if isinstance(calls, str):
        calls = _decoded(calls, f"'tool_calls' {where}")
    if isinstance(calls, Mapping):
        calls = [calls]
    read = []
    for call in calls or []:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"a tool call {where} is {shown(call)}, expected an object with 'name' and 'arguments'")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = {} if arguments is None or arguments == "" else arguments
        if isinstance(arguments, str) and not isinstance(_decoded(arguments, f"the arguments {where}"), dict):
            raise BadRow(f"the arguments of a tool call {where} are {shown(arguments)}, expected a JSON object")
        if not isinstance(arguments, str | Mapping):
            raise BadRow(f"the arguments of a tool call {where} are {shown(arguments)}, expected an object or JSON")
        named = {"name": function["name"], "arguments": arguments}
        others = {key: call[key] for key in ("id",) if call is not function and call.get(key) is not None}
        read.append({"type": "function", **others, "function": named})
    return read


def _joined(parts: list[Any], where: str) -> str:
    """The text of content that comes in parts."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS or not isinstance(part, Mapping):
            raise BadRow(
                f"the content {where} holds a part of the kind {shown(kind)}; only text can be trained on here"
            )
        texts.append(checked_text(part.get("text"), f"a text part {where}", may_be_empty=True))
    return "".join(texts)


def _weight(given: dict[str, Any], where: str) -> float:
    """How much a turn counts, taken out of it: the product of what it says under several names."""
    weight = 1.0
    for name, kind in WEIGHTS.items():
        value = given.pop(name, None)
        if value is None:
            continue
        if not isinstance(value, bool if kind is bool else int | float) or not math.isfinite(value) or value < 0:
            expected = "true or false" if kind is bool else "a number that is not negative"
            raise BadRow(f"{name!r} {where} is {shown(value)}, expected {expected}")
        weight *= float(value)
    return weight


def _decoded(value: Any, what: str) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"{what} is {shown(value)}, expected JSON") from None
