"""What of a conversation is learned: the text that the model sees, and the characters of it that it has to write.

A turn is told from its prompt by prefix difference: the chat template renders the conversation up to the turn with the
start of an answer, and the conversation through the turn; what follows the first in the second is what a model writes
when it is asked. Turns that are the same in a longer conversation are learned together, as one example. A template that
writes earlier turns differently (without their reasoning, with another end token, with the tools elsewhere) makes one
example for each turn that it rewrites: there the turn is as the model would have written it. Where a template says
itself what the assistant generates, only that is learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from lit_lora.data.chats.chat_template import ChatTemplate, common_length
from lit_lora.data.chats.conversation import BadRow, Conversation
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.template_needs import Reasoning, TemplateNeeds, inline, reasoning_of, without_thinking
from lit_lora.data.chats.turn_end import EndPattern
from lit_lora.data.rows.sources import Problems, shown

TrainOnTurns = Literal["all", "last"]


class Span(NamedTuple):
    """A stretch of text that is learned: characters ``[start, end)``."""

    start: int
    end: int
    weight: float


class LearnedText(NamedTuple):
    """What the model sees of a conversation, without what comes after the last that it learns."""

    text: str
    spans: list[Span]
    """In their order."""
    borders: list[int]
    """Where prompts end, in characters: the model goes on from there, so no token may reach over."""
    needs_end: bool
    """Whether an end-of-sequence token is to follow, since the template has no end token there."""


class _Turn(NamedTuple):
    at: int
    weight: float
    text: str
    """The conversation through the turn."""
    start: int
    end: int | None
    """After its end token; None where there is none."""
    as_asked: bool = False
    """Whether ``text`` goes on from the prompt in another way than the template writes it."""


class ChatReader:
    """Finds out what is learned of conversations.

    Args:
        template: to render them with.
        problems: counts what is done with conversations that are not learned as they are.
        train_on_prompt: learn all of the text.
        train_on_turns: learn all answers or the last one.
        reasoning: learn reasoning, show it without learning it, or leave it out.
        ignore: keys of turns that need not be used.
    """

    def __init__(
        self,
        template: ChatTemplate,
        problems: Problems,
        *,
        train_on_prompt: bool = False,
        train_on_turns: TrainOnTurns = "all",
        reasoning: Reasoning = "keep",
        ignore: Collection[str] = (),
    ) -> None:
        self.template = template
        self.needs = TemplateNeeds(template, ignore)
        self.ends = EndPattern(template)
        self.problems = problems
        self.train_on_prompt = train_on_prompt
        self.train_on_turns = train_on_turns
        self.reasoning = reasoning

    def read(self, example: Example) -> list[LearnedText]:
        """What is learned of an example: several texts where the template rewrites turns, none where nothing is to be.

        Raises:
            BadRow: if the template refuses it, or leaves out what is to be learned.
        """
        assert not isinstance(example.content, str)
        answers = [
            (i, turn.get("weight", 1.0)) for i, turn in enumerate(example.content) if turn["role"] == "assistant"
        ]
        turns = self.needs.adapted(example, self.problems, self.reasoning)
        dropped = len(example.content) - len(turns)  # a system message may have become part of the turn after it
        answers = [(index - dropped, weight) for index, weight in answers]
        if self.train_on_prompt:
            return [self._whole(example, turns, answers)]
        if self.train_on_turns == "last":
            answers = answers[-1:]
        learned = [(index, weight) for index, weight in answers if weight]
        if learned and learned[0][0] == 0:
            self.problems.note("the answer that a conversation begins with is not learned: nothing asks for it")
            learned = learned[1:]
        if not learned:
            self.problems.note("a conversation without a turn to learn (train: false, weight: 0, or only the first)")
            return []
        return self._grouped(example, turns, [self._turn(example, turns, index, weight) for index, weight in learned])

    def _render(self, example: Example, turns: Conversation, *, generation: bool = False) -> str:
        return self.template.render(turns, example.tools, example.options, generation=generation)

    def _turn(self, example: Example, turns: Conversation, index: int, weight: float) -> _Turn:
        prompt = self._render(example, turns[:index], generation=True)
        text = self._render(example, turns[: index + 1])
        if (whole := _with_reasoning(prompt, text, turns[index])) is not None:
            self.problems.note(
                "the chat template cuts the reasoning out of an answer, and begins an answer with reasoning: it is "
                "learned from there"
            )
            return _Turn(index, weight, whole, len(prompt), self.ends.end_of(whole, len(prompt)), True)
        start = len(prompt)
        if not text.startswith(prompt):
            start = self.ends.common(text, prompt)
            before = self._render(example, turns[:index])
            needed = (self.ends.end_of(before, 0) or len(before)) if before.strip() else 0
            if start < min(needed, len(before.rstrip())):
                raise BadRow(
                    f"turns 1 to {index} are rendered differently when turn {index + 1} follows, so that prompt and "
                    "answer cannot be told apart: set a chat_template without that, or split the conversation"
                )
            if opened := prompt[start:]:
                self.problems.note(
                    f"the chat template begins an answer with {shown(opened)} when it is to be written, and not where "
                    "it is learned: answers are learned without it"
                )
        _check_answer(turns, index, text[start:])
        return _Turn(index, weight, text, start, self.ends.end_of(text, start))

    def _grouped(self, example: Example, turns: Conversation, learned: Sequence[_Turn]) -> list[LearnedText]:
        """The fewest texts in which every turn stands as it would be written."""
        groups: list[list[_Turn]] = []
        for turn in reversed(learned):
            if groups and _stands_in(turn, groups[-1][0].text):
                groups[-1].append(turn)
            else:
                groups.append([turn])
        if len(groups) > 1:
            self.problems.note(
                "the chat template rewrites earlier turns: a conversation is learned as several examples, each ending "
                "with an answer as it is written when it is the last"
            )
        return [self._learned(example, turns, group) for group in reversed(groups)]

    def _learned(self, example: Example, turns: Conversation, group: Sequence[_Turn]) -> LearnedText:
        last = group[0]
        text = last.text[: last.end or len(last.text.rstrip())]
        _check_shown(turns[: last.at], text)
        marked = None
        if self.template.marks(example.tools) and not any(turn.as_asked for turn in group):
            marked = self.template.marked_spans(turns[: last.at + 1], example.tools, example.options)
        spans: list[Span] = []
        for turn in reversed(group):
            end = min(self._end_in(turn, last.text), len(text))
            parts = [(turn.start, end)] if marked is None else self._marked(turn.start, end, marked, text)
            if not parts:
                self.problems.note("a turn that the chat template's {% generation %} leaves out is not learned")
            if self.reasoning == "mask":
                parts = _without(parts, text, reasoning_of(turns[turn.at]))
            spans += [Span(*part, turn.weight) for part in parts]
        return LearnedText(text, spans, [turn.start for turn in reversed(group)], last.end is None)

    def _end_in(self, turn: _Turn, text: str) -> int:
        """The end of a turn in the text of a longer conversation."""
        if turn.end is not None:
            return turn.end
        end = common_length(turn.text, text)
        following = self.ends.pattern.match(text, end)  # what begins the next turn can be what ends this one
        return following.end() if following else end

    def _marked(self, start: int, end: int, marked: Iterable[tuple[int, int]], text: str) -> list[tuple[int, int]]:
        """What of a turn the template marks, with the end token that follows."""
        parts = [(max(start, a), min(end, b)) for a, b in marked if max(start, a) < min(end, b)]
        if parts and self.ends.is_tail(text[parts[-1][1] : end]):
            parts[-1] = (parts[-1][0], end)
        return parts

    def _whole(self, example: Example, turns: Conversation, answers: Sequence[tuple[int, float]]) -> LearnedText:
        """All of the text is learned, but for answers that count less or nothing."""
        full = self._render(example, turns)
        _check_shown(turns, full)
        ends_with_answer = turns[-1]["role"] == "assistant"
        end = self.ends.end_of(full, 0) if ends_with_answer else len(full)
        text = full[: end or len(full.rstrip())]
        spans, position = [], 0
        for index, weight in answers:
            if weight == 1 or index == 0:
                continue
            turn = self._turn(example, turns, index, weight)
            if not _stands_in(turn, full):
                raise BadRow(f"turn {index + 1} is rewritten by the template, so its end cannot be found")
            stop = min(self._end_in(turn, full), len(text))
            spans += [Span(position, turn.start, 1.0), *([Span(turn.start, stop, weight)] if weight else [])]
            position = stop
        spans.append(Span(position, len(text), 1.0))
        return LearnedText(text, [span for span in spans if span.start < span.end], [], end is None)


def _with_reasoning(prompt: str, text: str, turn: dict[str, Any]) -> str | None:
    """The text with the reasoning that the template cut out of it, where the prompt has begun it; else None.

    Such a template shows answers as they come back to the model, and the reasoning has no place there. What the model
    writes after the prompt is what the data says.
    """
    content = inline(turn["reasoning_content"], _text(turn)) if "reasoning_content" in turn else _text(turn)
    answer = without_thinking(content)
    place = text.rfind(answer.strip()) if answer.strip() and answer != content else -1
    if place < 0 or _has(text, reasoning_of({"content": content})):
        return None
    tag = content.strip()[: content.strip().index(">") + 1] if content.strip().startswith("<") else "[THINK]"
    if not prompt.rstrip().endswith(tag):
        return None
    body = content.strip()[len(tag) :]
    return prompt + (body.lstrip("\n") if prompt.endswith("\n") else body) + text[place + len(answer.strip()) :]


def _stands_in(turn: _Turn, text: str) -> bool:
    """Whether a longer conversation has the turn as it was written."""
    end = turn.end or len(turn.text.rstrip())
    return text[:end] == turn.text[:end]


def _check_answer(turns: Conversation, index: int, written: str) -> None:
    """Check that a turn is written out.

    Raises:
        BadRow: naming what the template leaves out.
    """
    turn, where = turns[index], f"of turn {index + 1}"
    content, reasoning = _text(turn), reasoning_of({**turn, "content": _text(turn)})
    for call in turn.get("tool_calls", ()):
        if call["function"]["name"] not in written:
            raise BadRow(f"the template leaves out the tool call {shown(call['function']['name'])} {where}")
    if not _has(written, without_thinking(content)):
        raise BadRow(f"the template leaves out the answer {where}, or rewrites it")
    if not _has(written, reasoning):
        raise BadRow(
            f"the template leaves out the reasoning {where}, although it is the answer to learn: set a chat_template "
            "that shows it, or reasoning to drop to learn answers without it"
        )


def _check_shown(turns: Conversation, text: str) -> None:
    """Check that what is said to the assistant is written out.

    Raises:
        BadRow: naming the turn that is not.
    """
    for number, turn in enumerate(turns, start=1):
        if turn["role"] != "assistant" and not _has(text, _text(turn)):
            raise BadRow(f"the template leaves out turn {number} ({turn['role']}), or rewrites it")


def _text(turn: dict[str, object]) -> str:
    """The content of a turn as text."""
    content = turn.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)  # type: ignore[attr-defined]


def _has(written: str, text: str) -> bool:
    """Whether a text is written out: as it is, with other white space, or as a JSON string."""
    text = text.strip()
    if text in written:
        return True
    squeezed = "".join(written.split())
    return "".join(text.split()) in squeezed or "".join(json.dumps(text, ensure_ascii=False)[1:-1].split()) in squeezed


def _without(parts: Sequence[tuple[int, int]], text: str, reasoning: str) -> list[tuple[int, int]]:
    """What is left of stretches of text without the reasoning in them."""
    words = reasoning.split()
    found = re.compile(r"\s+".join(map(re.escape, words))).search(text, parts[0][0], parts[-1][1]) if words else None
    if found is None:
        return list(parts)
    left = []
    for start, end in parts:
        left += [(start, min(end, found.start())), (max(start, found.end()), end)]
    return [(start, end) for start, end in left if start < end]
