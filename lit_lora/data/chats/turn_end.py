"""What ends an answer in a tokenizer's chat template: found by rendering one, not by a list of names.

A model stops by itself only at what it was trained to write last. That need not be the end-of-sequence token: with
ChatML it is ``<|im_end|>``, while the base's may be ``<|endoftext|>``. ``turns.py`` marks the same tokens as learned
that are found here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.chat_template import ChatTemplate, common_length
from lit_lora.data.chats.template_needs import TemplateNeeds

_QUESTION, _ANSWER = "qwyx", "zwxk"
"""Letters that no template writes by itself, and none of them changes: no case, white space or markup."""


class TurnEnd(NamedTuple):
    """Where generating an answer stops."""

    ids: list[int]
    """Tokens; the end-of-sequence token is always among them, last."""
    strings: list[str]
    """Texts, of a template that ends an answer, or begins the next turn, without a token for it."""


def text_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """The end of plain text: the end-of-sequence token."""
    return TurnEnd([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)], [])


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """The end of an answer in the tokenizer's chat template, or in the built-in one where it has none.

    That is the first added token after an answer at the end of a conversation, and after a tool call, and any text
    before it. Where there is none, it is what begins the next turn; an end-of-sequence token comes in training, but
    only after the text.
    """
    template = ChatTemplate(tokenizer)
    ids: list[int] = []
    strings: list[str] = []
    last, ended = _split(tokenizer, _after_answer(template), ids)
    if last.strip():
        strings.append(last.strip())
    if not ended:
        between, found = _split(tokenizer, _after_answer(template, followed=True), ids)
        if not found and not strings and between.strip():
            strings.append(between.rstrip())  # what begins the next turn
    if "tool_calls" in template.words():
        ids += [token_id for token_id in _call_end(template) if token_id not in ids]
    return TurnEnd([*ids, *(token for token in text_end(tokenizer).ids if token not in ids)], strings)


def is_hidden(tokenizer: PreTrainedTokenizerBase, end: TurnEnd) -> bool:
    """Whether text that is decoded without special tokens shows nothing of the end."""
    added = tokenizer.added_tokens_decoder
    return not end.strings and all(token not in added or added[token].special for token in end.ids)


class EndPattern:
    """Finds the end of an answer in rendered text.

    Args:
        template: that rendered it.
    """

    def __init__(self, template: ChatTemplate) -> None:
        tokenizer = template.tokenizer
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        others = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        enders = {token_id for token_id, token in added.items() if token.special} - others
        enders |= set(turn_end(tokenizer).ids)
        texts = {str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in enders}
        self.pattern = _any_of(texts)
        self._texts = tuple(sorted(texts, key=len, reverse=True))
        self._before_space = re.compile(rf"(?:{self.pattern.pattern})\s*\Z")
        tokens = [str(token.content) for token in added.values()]
        self._pieces = re.compile(rf"{_any_of(tokens).pattern}|<[^<>\s]+>|.", re.DOTALL)
        self._only_last = self._text_at_the_end_only(template)

    def end_of(self, text: str, start: int) -> int | None:
        """Where the answer from ``start`` to the end of a conversation ends, with its end token; None without one."""
        if self._only_last and text.endswith(self._only_last):
            text = text[: -len(self._only_last)]
        text = text.rstrip()
        return len(text) if text.endswith(self._texts) and len(text) > start else None

    def is_tail(self, text: str) -> bool:
        """Whether there is nothing in it but end tokens and white space."""
        return not self.pattern.sub("", text).strip()

    def common(self, a: str, b: str) -> int:
        """How many characters two texts have in common from their beginning, and no part of a tag or special token."""
        a_pieces, b_pieces = self._pieces.findall(a), self._pieces.findall(b)
        return len("".join(a_pieces[: common_length(a_pieces, b_pieces)]))

    def _text_at_the_end_only(self, template: ChatTemplate) -> str:
        """What follows the end token of the last answer, but of no other: no model comes to write it."""
        last = _after_answer(template)
        common = self.common(last, _after_answer(template, followed=True))
        return last[common:] if self._before_space.search(last[:common]) else ""


def _any_of(texts: Sequence[str] | set[str]) -> re.Pattern[str]:
    longest_first = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _after_answer(template: ChatTemplate, *, followed: bool = False) -> str:
    """What the template writes after the answer, up to a following question; nothing where it refuses them."""
    needs = TemplateNeeds(template)
    question = {"role": "user", "content": needs.content(_QUESTION)}
    answer = {"role": "assistant", "content": needs.content(_ANSWER)}
    text = needs.rendered([question, answer, *([question] if followed else [])]) or ""
    after = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
    return after.rpartition(_QUESTION)[0] if followed else after


def _call_end(template: ChatTemplate) -> list[int]:
    """The special token that a tool call ends with, or else what begins a tool's result; none where there is none."""
    needs = TemplateNeeds(template)
    call = needs.rendered_call().rstrip()
    followed = needs.rendered_call(followed=True)
    tokens = _added_tokens(template.tokenizer, call)
    added = template.tokenizer.added_tokens_decoder
    if tokens and tokens[-1][0] + len(added[tokens[-1][1]].content) == len(call) and added[tokens[-1][1]].special:
        return [tokens[-1][1]]
    if not call or not followed.startswith(call):
        return []
    following = _added_tokens(template.tokenizer, followed[len(call) :])
    return [token_id for _, token_id in following[:1] if added[token_id].special]


def _split(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> tuple[str, bool]:
    """The text before the first added token in it, which is appended to ``ids``; and whether there is one."""
    found = _added_tokens(tokenizer, text)
    if not found:
        return text, False
    start, token_id = found[0]
    if token_id not in ids:
        ids.append(token_id)
    return text[:start], True


def _added_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Where added tokens stand in a text, in their order, and which they are; some tokenizers add runs of spaces."""
    ids = {str(token.content): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return [(match.start(), ids[match.group()]) for match in _any_of(set(ids)).finditer(text)]
