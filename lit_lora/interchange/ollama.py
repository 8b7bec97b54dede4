"""A Modelfile for Ollama: the GGUF file, what surrounds turns, and what ends an answer.

Ollama writes prompts by a template of its own language, and takes one that it knows by itself where it finds a similar
one in the file. Here it is worked out from the tokenizer's chat template: what stands before and after the text of each
role. Conversations that are written so are compared with the chat template's own; a template that does more (tools,
dates, reasoning) is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Turns = list[dict[str, str]]

_SYSTEM, _USER, _ANSWER, _AGAIN = "Be terse.", "What is rain?", "Water that falls.", "And snow?"
_NOT_EXPRESSED = "this chat template cannot be written as Ollama's: {}. Write the file alone (--to gguf)"


class Wrapping(NamedTuple):
    """What stands around the texts of a conversation."""

    start: str
    """Of a conversation without a system message."""
    system: tuple[str, str]
    """Around a system message, with which a conversation starts."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    """Asks for an answer."""

    def render(self, turns: Turns) -> str:
        """A conversation, and the prompt for the next answer."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = "" if turns[0]["role"] == "system" else self.start
        for turn in turns:
            before, after = roles[turn["role"]]
            text += before + turn["content"] + after
        return text + self.prompt


def wrapping(tokenizer: Any) -> Wrapping:
    """Work out what a chat template puts around texts.

    Raises:
        ValueError: if it does more, or there is none.
    """
    if not tokenizer.chat_template:
        raise ValueError(_NOT_EXPRESSED.format("the tokenizer has none"))
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    answer, again = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}

    def rendered(turns: Turns, prompt: bool = True) -> str:
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # whatever a template raises
            raise ValueError(_NOT_EXPRESSED.format(f"it refuses a conversation ({error})")) from error

    try:
        asked, unasked = rendered([user]), rendered([user], prompt=False)
        prompt = asked.removeprefix(unasked)
        before_user, user_end = _around(unasked, _USER)
        _, answer_end = _around(rendered([user, answer], prompt=False), _ANSWER)
        between = rendered([user, answer, again]).partition(_USER)[2]
        answer_start = _after(between.partition(_ANSWER)[0], user_end)
        user_start = _after(between.partition(_ANSWER)[2].partition(_AGAIN)[0], answer_end)
        system_start, rest = _around(rendered([system, user], prompt=False), _SYSTEM)
        found = Wrapping(
            start=_before(before_user, user_start),
            system=(system_start, _before(rest.partition(_USER)[0], user_start)),
            user=(user_start, user_end),
            assistant=(answer_start, answer_end),
            prompt=prompt,
        )
    except LookupError as error:
        raise ValueError(_NOT_EXPRESSED.format("it does more than to put something around texts")) from error
    for turns in ([user], [system, user], [user, answer, again], [system, user, answer, again, answer, user]):
        if found.render(turns) != rendered(turns):
            raise ValueError(_NOT_EXPRESSED.format("it does more than to put something around texts"))
    return found


def modelfile(gguf_name: str, tokenizer: Any, stops: Iterable[str], *, adds_bos: bool) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: of the file beside it.
        tokenizer: with the chat template.
        stops: what ends an answer.
        adds_bos: whether the reader of the file puts the first token before a prompt by itself.

    Raises:
        ValueError: if the chat template cannot be written so.
    """
    found = wrapping(tokenizer)
    bos = tokenizer.bos_token if adds_bos else ""
    if bos:
        before, after = found.system
        found = found._replace(start=found.start.removeprefix(bos), system=(before.removeprefix(bos), after))
    branches = [("system", found.system), ("user", found.user), ("assistant", found.assistant)]
    turns = "".join(
        f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for role, (before, after) in branches
    )
    start = ""
    if found.start:
        start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{found.start}{{{{ end }}}}'
    template = f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{found.prompt}"
    if '"""' in template or any(mark in part for part in _texts(found) for mark in ("{{", "}}")):
        raise ValueError(_NOT_EXPRESSED.format("it holds quotes or braces that Ollama would read"))
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"


def _texts(found: Wrapping) -> list[str]:
    return [found.start, *found.system, *found.user, *found.assistant, found.prompt]


def _quoted(text: str) -> str:
    if '"' in text or "\n" in text:
        return f'"""{text}"""'
    return f'"{text}"'


def _around(text: str, content: str) -> tuple[str, str]:
    before, found, after = text.partition(content)
    if not found:
        raise LookupError(content)
    return before, after


def _after(text: str, start: str) -> str:
    if not text.startswith(start):
        raise LookupError(start)
    return text[len(start) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise LookupError(end)
    return text[: len(text) - len(end)]
