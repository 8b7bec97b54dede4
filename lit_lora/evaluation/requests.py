"""A file of prompts, each perhaps with the name of the adapter that is to answer it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_lora.data.rows.readers import SUFFIXES, suffix_of
from lit_lora.data.rows.rows import shown, shown_names
from lit_lora.data.rows.sources import Problems, existing_file, read_rows
from lit_lora.evaluation.generate import BASE, Prompt
from lit_lora.files.meant import closest, did_you_mean
from lit_lora.files.shipped import shipped

_LINES = ".jsonl"
_LONGEST_NAME = 200


class Request(NamedTuple):
    """One row."""

    prompt: Prompt
    adapter: str | None
    """None for the base alone."""


def request_file(prompt: str) -> str | None:
    """The file of prompts that was given as a prompt; None for a prompt.

    Raises:
        FileNotFoundError: for a name that can be nothing else, where there is no such file.
    """
    if suffix_of(Path(prompt)) not in SUFFIXES or "\n" in prompt or max(map(len, prompt.split("/"))) > _LONGEST_NAME:
        return None
    if Path(os.path.expanduser(prompt)).is_file():
        return prompt
    found = shipped(prompt)
    if found is None and prompt.endswith(_LINES) and not any(character.isspace() for character in prompt):
        existing_file(prompt)
    return found


def read_requests(file: str, adapters: Sequence[str]) -> list[Request]:
    """Read prompts: of each row ``prompt``, or ``messages`` up to the answer, and ``adapter``.

    A row may leave out ``adapter`` where there is one, or none; null or ``"__base__"`` is the base alone.

    Args:
        file: in any format that training reads.
        adapters: names of those that there are.

    Raises:
        ValueError: naming the rows that cannot be asked, and why.
    """
    problems = Problems(file)
    found: list[Request] = []
    for row in read_rows(file, problems):
        why = _why_not(row.fields, adapters)
        if why:
            problems.add(row.line, why)
        else:
            name = row.fields.get("adapter", adapters[0] if adapters else None)
            found.append(Request(_prompt(row.fields), None if name == BASE else name))
    if problems.count:
        raise ValueError(f"{file}: {problems.count} rows cannot be asked:\n{problems}")
    if not found:
        raise ValueError(f"{file} holds no row: expected one with 'prompt' or 'messages' for each answer")
    return found


def _why_not(fields: Mapping[str, Any], adapters: Sequence[str]) -> str:
    prompt = _prompt(fields)
    is_turns = isinstance(prompt, list) and all(isinstance(t, Mapping) and {"role", "content"} <= {*t} for t in prompt)
    if not prompt or not (is_turns or (isinstance(prompt, str) and prompt.strip())):
        if "prompt" not in fields and "messages" not in fields:
            return f"no field 'prompt' or 'messages', got {shown_names(sorted(map(str, fields)))}"
        return f"the prompt is {shown(prompt)}, expected a text, or turns that end with the user's"
    if fields.get("tools"):
        return "tools are not read here: lit_lora.generate(tools=...) takes them"
    name = fields.get("adapter")
    if name is None or name == BASE:
        if "adapter" in fields or len(adapters) < 2:
            return ""
        return f"no field 'adapter': name one of {', '.join(adapters)}, or null for the base alone"
    if name in adapters:
        return ""
    if not adapters:
        return f"adapter {shown(name)} is not loaded: start with --adapter {name}=FOLDER"
    meant = (
        did_you_mean(closest(str(name), adapters)) or f"there are {', '.join(adapters)}, and null for the base alone"
    )
    return f"no adapter {shown(name)}: {meant}"


def _prompt(fields: Mapping[str, Any]) -> Any:
    """What is asked; an answer at the end of a conversation is left out."""
    if "prompt" in fields:
        return fields["prompt"]
    turns = fields.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) and turns[-1].get("role") == "assistant":
        return turns[:-1]
    return turns
