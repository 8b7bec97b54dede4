"""Byte-level tokenizers whose chat templates end an answer in different ways."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_lora.base.byte_tokenizer import _byte_characters

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|sep|>", "<|user|>", "<|pad|>"]
VOCAB_SIZE = 256 + len(TOKENS)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def each_turn(user: str, assistant: str, end: str, *, last: str = "") -> str:
    """A template of beginnings and one end for all turns, and what ends a whole conversation."""
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '" + user + "' + m['content'] + '" + end + "' }}"
        "{% else %}{{ '" + assistant + "' + m['content'] + '" + end + "' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + assistant + "' }}{% else %}{{ '" + last + "' }}{% endif %}"
    )


class Kind(NamedTuple):
    """A template, and what ends its answers."""

    template: str | None
    ids: list[str]
    """Tokens; the end-of-sequence token is the last."""
    strings: list[str] = []  # noqa: RUF012 (never written to)
    options: dict[str, Any] = {}  # noqa: RUF012


EOS = "<|endoftext|>"
KINDS = {
    "ChatML": Kind(CHATML, ["<|im_end|>", EOS]),
    "end of sequence": Kind(each_turn("Q: ", "A: ", EOS + "\\n"), [EOS]),
    "several tokens": Kind(each_turn("Q: ", "A: ", "<|end|><|sep|>\\n"), ["<|end|>", EOS]),
    "another at the end of all": Kind(each_turn("Q: ", "A: ", "<|end|>\\n", last=EOS), ["<|end|>", EOS]),
    "text": Kind(each_turn("USER: ", "ASSISTANT: ", "###END###\\n"), [EOS], ["###END###"]),
    "text and a token": Kind(each_turn("USER: ", "ASSISTANT: ", " [/A]<|end|>\\n"), ["<|end|>", EOS], ["[/A]"]),
    "white space": Kind(each_turn("USER: ", "ASSISTANT: ", "\\n"), [EOS], ["\nUSER:"]),
    "the next turn's beginning": Kind(each_turn("<|user|>", "<|sep|>", ""), ["<|user|>", EOS]),
    "a token that is not special": Kind(CHATML, ["<|im_end|>", EOS], options={"special": False}),
    "the padding token": Kind(CHATML, ["<|im_end|>", EOS], options={"pad_token": "<|im_end|>"}),
    "no template": Kind(None, [EOS]),
}


def chat_tokenizer(
    template: str | None = CHATML,
    *,
    special: bool = True,
    pad_token: str = "<|pad|>",
    merges: Sequence[tuple[str, str]] = (),
) -> PreTrainedTokenizerFast:
    """256 bytes and a few tokens; the end-of-sequence token is ``<|endoftext|>``, as in a base model.

    With merges, words are split as by GPT-2, and what is merged has ids from 256.
    """
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    vocabulary |= {"".join(merge): 256 + number for number, merge in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    backend.decoder = decoders.ByteLevel()
    for token in TOKENS:
        is_special = special or token == EOS
        add = backend.add_special_tokens if is_special else backend.add_tokens
        add([AddedToken(token, special=is_special, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=pad_token, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def save_chat_tokenizer(folder: Path, template: str | None = CHATML) -> str:
    """The folder of such a tokenizer, without a model."""
    chat_tokenizer(template).save_pretrained(folder)
    return str(folder)
