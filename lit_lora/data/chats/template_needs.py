"""What a chat template needs to be given, found by rendering probes: templates differ in the messages that they take.

A tool call's arguments as an object or as JSON, its content empty or absent, text as such or in parts, a system role or
none, other names of roles. Messages are brought into the form that is shown; what a template cannot show is counted.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from lit_lora.data.chats.chat_template import ChatTemplate
from lit_lora.data.chats.conversation import BadRow, Conversation
from lit_lora.data.chats.formats import Example
from lit_lora.data.rows.sources import Problems

Reasoning = Literal["keep", "mask", "drop"]

_THINKING = re.compile(r"\s*(<(think|thinking|reasoning|thought)>|\[THINK\])(.*?)(</\2>|\[/THINK\])\s*", re.DOTALL)
"""A block of reasoning at the beginning of an answer."""

_SAID, _NAME, _KEY, _VALUE = "qwyx", "zwxk", "kqzy", "vwqx"
"""Letters that no template writes by itself, and none of them changes."""

_JSON = re.compile(rf'(?<![\\{{])\{{\s*"{_KEY}"\s*:\s*"{_VALUE}"\s*\}}')
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": ""}}, "required": []},
    },
}
_OWN_KEYS = frozenset({"role", "content", "reasoning_content", "tool_calls", "weight"})
_PLAIN_KEYS = frozenset({"role", "content"})
_NO_SYSTEM = "the chat template shows no system message beside an answer: it is put before the next user message"


class _CallForm(NamedTuple):
    as_json: bool
    """Arguments as JSON text, not an object."""
    without_content: bool
    """No content, where it is empty."""


class TemplateNeeds:
    """What a template needs to be given.

    Args:
        template: the template.
        ignore: keys of turns that need not be used.
    """

    def __init__(self, template: ChatTemplate, ignore: Collection[str] = ()) -> None:
        self.template = template
        self.ignore = frozenset(ignore)

    def adapted(self, example: Example, problems: Problems, reasoning: Reasoning = "keep") -> Conversation:
        """The turns of an example in the form that the template takes.

        Args:
            example: of a conversation.
            problems: counts what the template has no use for.
            reasoning: "drop" takes it out.

        Raises:
            BadRow: if a turn can have no form that the template takes.
        """
        assert not isinstance(example.content, str)
        words = self.template.words(example.tools)
        if example.tools and "tools" not in words:
            problems.note("the chat template does not show the tools")
        for name in (example.options or {}).keys() - words:
            problems.note(f"chat_template_kwargs {name!r} is not used by the chat template")
        turns = []
        for turn in example.content:
            role, content = turn["role"], turn["content"]
            if turn.keys() <= _PLAIN_KEYS and (role == "user" or (role == "assistant" and reasoning != "drop")):
                turns.append(turn)
                continue
            fitting = {key: v for key, v in turn.items() if key in _OWN_KEYS or key in words or self._writes_all_keys}
            for key in turn.keys() - fitting.keys() - self.ignore:
                problems.note(f"key {key!r} of a turn is not used by the chat template")
            fitting.pop("weight", None)
            fitting["role"] = self._role(role, words)
            if role == "assistant":
                if reasoning == "drop":
                    fitting.pop("reasoning_content", None)
                    fitting["content"] = without_thinking(content)
                self._fit_reasoning(fitting, words)
                if "tool_calls" in fitting:
                    self._fit_calls(fitting)
            turns.append(fitting)
        if turns and turns[0]["role"] == "system" and not self.shows_system:
            problems.note(_NO_SYSTEM)
            turns = _folded(turns)
        if self.takes_parts:
            turns = [{**turn, "content": self.content(turn.get("content", ""))} for turn in turns]
        return turns

    @cached_property
    def shows_system(self) -> bool:
        """Whether a system message at the beginning is written, where an answer is asked for and where one is given."""
        system, user, assistant = (
            {"role": role, "content": self.content(text)}
            for role, text in (("system", _NAME), ("user", _SAID), ("assistant", _VALUE))
        )
        texts = [self.rendered([system, user]), self.rendered([system, user, assistant])]
        return all(text is not None and _NAME in text for text in texts) or self.rendered([user]) is None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether text must come as a list of parts."""
        plain = self.rendered([{"role": "user", "content": _SAID}])
        if plain is not None and _SAID in plain:
            return False
        parts = self.rendered([{"role": "user", "content": [{"type": "text", "text": _SAID}]}])
        return parts is not None and _SAID in parts

    def content(self, text: str) -> Any:
        """Text as the content of a turn."""
        return [{"type": "text", "text": text}] if self.takes_parts else text

    def rendered(self, messages: Conversation, tools: list[Any] | None = None) -> str | None:
        """What the template makes of these messages; None where it refuses them."""
        try:
            return self.template.render(messages, tools)
        except BadRow:
            return None

    def rendered_call(self, *, followed: bool = False) -> str:
        """What the template writes after a question that is answered by a tool call, and after the tool's result."""
        return self._rendered_call(self._call_form, followed=followed)

    @cached_property
    def _writes_all_keys(self) -> bool:
        """Whether a turn is written with keys that the template does not name, for example as JSON."""
        text = self.rendered([{"role": "user", "content": self.content(_SAID), _KEY: _VALUE}])
        return text is not None and _VALUE in text

    @cached_property
    def _shows_inline(self) -> bool:
        """Whether reasoning that stands at the beginning of an answer is written."""
        answer = {"role": "assistant", "content": self.content(inline(_NAME, _VALUE))}
        text = self.rendered([{"role": "user", "content": self.content(_SAID)}, answer])
        return text is not None and _NAME in text

    @cached_property
    def _call_form(self) -> _CallForm:
        shown = []
        for form in itertools.starmap(_CallForm, itertools.product((False, True), (False, True))):
            written = self._rendered_call(form)
            if _NAME in written and _VALUE in written:
                shown.append((not _JSON.search(written), form))
        return min(shown)[1] if shown else _CallForm(False, False)

    def _rendered_call(self, form: _CallForm, *, followed: bool = False) -> str:
        arguments: Any = {_KEY: _VALUE}
        function = {"name": _NAME, "arguments": json.dumps(arguments) if form.as_json else arguments}
        call = {"type": "function", "id": "a1b2c3d4e", "function": function}  # an id as long as some ask for
        turn = {"role": "assistant", "tool_calls": [call]} | ({} if form.without_content else {"content": ""})
        turns = [{"role": "user", "content": self.content(_SAID)}, turn]
        if followed:
            role = self._role("tool", self.template.words([_PROBE_TOOL]))
            turns.append({"role": role, "content": self.content("x"), "name": _NAME, "tool_call_id": call["id"]})
        text = self.rendered(turns, [_PROBE_TOOL])
        return "" if text is None else text.rpartition(_SAID)[2]

    def _role(self, role: str, words: frozenset[str]) -> str:
        if role == "developer" and "developer" not in words:
            return "system"
        if role == "tool" and "tool" not in words:
            return next((name for name in ("observation", "environment", "ipython", "function") if name in words), role)
        return role

    def _fit_reasoning(self, turn: dict[str, Any], words: frozenset[str]) -> None:
        """Reasoning where the template looks for it: transformers gives it under all of its names."""
        if "reasoning_content" not in turn or not words.isdisjoint(("reasoning_content", "thinking", "reasoning")):
            return
        if any("think>" in word for word in words) and self._shows_inline:
            turn["content"] = inline(turn.pop("reasoning_content"), turn["content"])

    def _fit_calls(self, turn: dict[str, Any]) -> None:
        form = self._call_form
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call["function"]["arguments"], form)}}
            for call in turn["tool_calls"]
        ]
        if form.without_content and not turn["content"]:
            del turn["content"]


def inline(reasoning: str, answer: str) -> str:
    """Reasoning at the beginning of an answer, as the models that write it themselves do."""
    return f"<think>\n{reasoning}\n</think>\n\n{answer}"


def without_thinking(content: str) -> str:
    """An answer without the reasoning that it begins with."""
    block = _THINKING.match(content)
    return content[block.end() :] if block else content


def reasoning_of(turn: Mapping[str, Any]) -> str:
    """The reasoning of a turn, in a field of its own or at the beginning of its content; empty where there is none."""
    if turn.get("reasoning_content"):
        return str(turn["reasoning_content"])
    block = _THINKING.match(turn["content"])
    return block.group(3) if block else ""


def _arguments(arguments: Any, form: _CallForm) -> Any:
    if form.as_json:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _folded(turns: Conversation) -> Conversation:
    """The system messages at the beginning, as the beginning of the user message after them."""
    texts = [turn["content"] for turn in itertools.takewhile(lambda turn: turn["role"] == "system", turns)]
    rest = turns[len(texts) :]
    if not rest or rest[0]["role"] != "user":
        raise BadRow("the chat template shows no system message, and no user message follows to put it before")
    return [{**rest[0], "content": "\n\n".join([*texts, rest[0]["content"]])}, *rest[1:]]
