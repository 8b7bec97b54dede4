"""Preference pairs: rows of a chosen and a rejected answer, as TRL has them. They are read and shown, not trained on.

The prompt stands in a column of its own (explicit), or begins both answers (implicit); all of it is text, or turns of a
conversation. A pair becomes two rows of an ordinary format, so that whatever reads those reads pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_lora.wording import advice

CHOSEN, REJECTED = "chosen", "rejected"
PAIRS = "preference pairs"
"""What stands for the name of a format."""

_PROMPTS = ("prompt", "question", "instruction", "conversations")
_BESIDE = ("system", "tools", "input", "chat_template_kwargs")
"""Columns that belong to either answer."""


class Pair(NamedTuple):
    """Two rows for one."""

    chosen: dict[str, Any]
    rejected: dict[str, Any]
    format: str
    """Of both, as ``data.format`` has it."""
    columns: dict[str, str] | None
    """With which the chosen answers alone can be trained on; None where no setting does it."""
    unused: list[str]
    """Columns that are in neither."""


def is_pair(fields: Mapping[str, Any], format: str, columns: Mapping[str, str] | None) -> bool:
    """Whether a row is a pair, unless the settings say what to take of it.

    Args:
        fields: of the row, by column.
        format: as it is set; other than "auto" it says what to take.
        columns: as they are set, field -> column.
    """
    columns = columns or {}
    if format != "auto" or columns.keys() - {"prompt", CHOSEN, REJECTED}:
        return False
    if columns and not columns.keys() & {CHOSEN, REJECTED}:
        return False
    return all(columns.get(name, name) in fields for name in (CHOSEN, REJECTED))


def split(fields: Mapping[str, Any], columns: Mapping[str, str] | None) -> Pair:
    """The two rows of a pair. What is wrong with them is left to whoever reads them.

    Args:
        fields: of the row, by column; a pair by :func:`is_pair`.
        columns: field -> column, for "prompt", "chosen" and "rejected".
    """
    columns = dict(columns or {})
    names = {name: columns.get(name, name) for name in (CHOSEN, REJECTED)}
    prompt_name = columns.get("prompt") or next((name for name in _PROMPTS if name in fields), None)
    answers = {name: fields.get(column) for name, column in names.items()}
    used = {*names.values(), *(name for name in _BESIDE if name in fields)}
    beside = {name: fields[name] for name in _BESIDE if name in fields}
    prompt = fields.get(prompt_name) if prompt_name is not None else None
    if not any(isinstance(answer, (list, dict)) for answer in answers.values()) and not isinstance(prompt, list):
        if prompt_name is None:
            rows = {name: {"text": answer, **beside} for name, answer in answers.items()}
            return _pair(rows, "text", {"text": names[CHOSEN]}, fields, used)
        if prompt_name == "instruction":
            rows = {name: {"instruction": prompt, "output": answer, **beside} for name, answer in answers.items()}
            return _pair(rows, "alpaca", {"output": names[CHOSEN]}, fields, used | {prompt_name})
        rows = {name: {"prompt": prompt, "completion": answer, **beside} for name, answer in answers.items()}
        return _pair(rows, "prompt_completion", _of_prompt(prompt_name, names), fields, used | {prompt_name})
    turns = {name: [answer] if isinstance(answer, dict) else answer for name, answer in answers.items()}
    is_sharegpt = "from" in _first(turns[CHOSEN]) or "from" in _first(prompt)
    format, field = ("sharegpt", "conversations") if is_sharegpt else ("messages", "messages")
    if prompt_name is None or _holds_prompt(turns[CHOSEN]):
        rows = {name: {field: answer, **beside} for name, answer in turns.items()}
        return _pair(rows, format, {field: names[CHOSEN]}, fields, used)
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rows = {name: {field: _joined(before, answer), **beside} for name, answer in turns.items()}
    read = isinstance(answers[CHOSEN], list) and not is_sharegpt  # as the format prompt_completion reads turns
    return _pair(rows, format, _of_prompt(prompt_name, names) if read else None, fields, used | {prompt_name})


def refusal(fields: Mapping[str, Any], columns: Mapping[str, str] | None) -> str:
    """Why a pair is not trained on, and how its chosen answer is."""
    chosen = split(fields, columns).columns
    by_hand = "write the chosen ones to a file of their own"
    how = by_hand if chosen is None else advice("set {}", "data.columns", chosen, otherwise=by_hand)
    return (
        f"these are {PAIRS}: each prompt has two answers, {CHOSEN} and {REJECTED}, and training takes one. "
        f"To train on the chosen ones alone, {how}; lit-lora data shows both"
    )


def _pair(
    rows: dict[str, dict[str, Any]],
    format: str,
    columns: dict[str, str] | None,
    fields: Mapping[str, Any],
    used: set[str],
) -> Pair:
    unused = [name for name in fields if name not in used]
    return Pair(rows[CHOSEN], rows[REJECTED], format, columns, unused)


def _of_prompt(prompt: str, names: Mapping[str, str]) -> dict[str, str]:
    return {"prompt": prompt, "completion": names[CHOSEN]}


def _joined(before: Any, answer: Any) -> Any:
    return [*before, *answer] if isinstance(before, list) and isinstance(answer, list) else answer


def _first(turns: Any) -> Mapping[str, Any]:
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) else {}


def _holds_prompt(turns: Any) -> bool:
    """Whether an answer begins with what it answers."""
    first = _first(turns)
    return first.get("role", first.get("from")) in ("system", "developer", "user", "human")
