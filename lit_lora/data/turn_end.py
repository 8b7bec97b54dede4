"""What ends an answer in a tokenizer's chat template: found by rendering one, not by a list of names.

A model stops by itself only at what it was trained to write last. That need not be the end-of-sequence token: with
ChatML it is ``<|im_end|>``, while the base's may be ``<|endoftext|>``. ``tokenize.py`` supervises the same tokens that
are found here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_lora.data.conversation import BadRow
from lit_lora.data.tokenize import chat_template, render, render_limit

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

    That is the first added token after an answer, at the end of a conversation or before the next turn, and any text
    before it. Where there is no such token, an end-of-sequence token comes in training, but only after the text.
    """
    ids: list[int] = []
    strings: list[str] = []
    question, answer = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
    last, _ = _split(tokenizer, _after_answer(tokenizer, [question, answer]), ids)
    if last.strip():
        strings.append(last.strip())
    following = _after_answer(tokenizer, [question, answer, {"role": "user", "content": _QUESTION}])
    between, ended = _split(tokenizer, following.rpartition(_QUESTION)[0], ids)
    if not ended and not strings and between.strip():
        strings.append(between.rstrip())  # what begins the next turn
    return TurnEnd([*ids, *(token for token in text_end(tokenizer).ids if token not in ids)], strings)


def is_hidden(tokenizer: PreTrainedTokenizerBase, end: TurnEnd) -> bool:
    """Whether text that is decoded without special tokens shows nothing of the end."""
    added = tokenizer.added_tokens_decoder
    return not end.strings and all(token not in added or added[token].special for token in end.ids)


def _after_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """What the template writes after the answer; nothing where it refuses these messages."""
    try:
        with render_limit(tokenizer, [list(messages)]):
            text = render(tokenizer, chat_template(tokenizer), list(messages))
    except BadRow:
        return ""
    return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""


def _split(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> tuple[str, bool]:
    """The text before the first added token in it, which is appended to ``ids``; and whether there is one."""
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    found = [
        (text.index(token.content), -len(token.content), token_id)
        for token_id, token in added.items()
        if token.content.strip() and token.content in text  # some tokenizers add runs of spaces
    ]
    if not found:
        return text, False
    start, _, token_id = min(found)
    if token_id not in ids:
        ids.append(token_id)
    return text[:start], True
