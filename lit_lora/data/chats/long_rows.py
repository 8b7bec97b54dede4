"""Rows that are longer than a model is trained on: cut off at their end, left out, or parted into several examples."""

from __future__ import annotations

from typing import Literal

from lit_lora.data.chats.formats import Example

LongRows = Literal["truncate", "drop", "split"]


def halves(example: Example, *, last_only: bool = False) -> list[Example]:
    """A conversation parted between two exchanges, near its middle; both begin with its system messages.

    Args:
        example: of a conversation.
        last_only: give the second alone: nothing of the first is learned.

    Returns:
        Empty where it has one exchange, or a half would have nothing to learn.
    """
    assert not isinstance(example.content, str)
    turns = example.content
    first = next((i for i, turn in enumerate(turns) if turn["role"] not in ("system", "developer")), len(turns))
    learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("weight", 1) and i > first]
    before = [0]
    for turn in turns:
        before.append(before[-1] + len(turn["content"]))
    cuts = [
        i
        for i in range(first + 1, len(turns))
        if turns[i]["role"] == "user" and turns[i - 1]["role"] != "user" and learned and learned[0] < i <= learned[-1]
    ]
    if not cuts:
        return []
    cut = min(cuts, key=lambda i: abs(2 * before[i] - before[-1] - before[first]))
    parts = [turns[:cut], [*turns[:first], *turns[cut:]]]
    return [example._replace(content=part) for part in parts[last_only:]]


def chunks(ids: list[int], max_length: int) -> list[tuple[int, int]]:
    """Stretches ``[start, end)`` of plain text, each of which begins with the last token of the one before.

    So every token but the very first is predicted once.

    Args:
        ids: of the text.
        max_length: longest stretch.
    """
    starts = range(0, max(1, len(ids) - 1), max_length - 1)
    return [(start, min(start + max_length, len(ids))) for start in starts]
