"""From examples to token ids and a mask of the supervised ones.

What of a conversation is learned is told by position in its rendered text (``turns.py``), and a text is tokenized as a
whole. Only where a token would reach over the end of a prompt is it parted there, since a model that is asked goes on
from the prompt's own tokens. Nothing is masked by token id, so ``pad_token == eos_token`` is harmless.
"""

from __future__ import annotations

import itertools
import sys
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.chat_template import ChatTemplate, check_end_of_sequence, common_length, run_tokenizer
from lit_lora.data.chats.conversation import BadRow, Conversation
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.long_rows import LongRows, chunks, halves
from lit_lora.data.chats.template_needs import Reasoning, TemplateNeeds, without_thinking
from lit_lora.data.chats.turns import ChatReader, LearnedText, TrainOnTurns
from lit_lora.data.rows.sources import Problems


class Encoded(NamedTuple):
    """One tokenized example."""

    line: int
    ids: list[int]
    mask: list[bool]
    """True where the token is supervised, that is, predicted from those before it. Never true for the first."""
    truncated: bool
    weights: list[float] | None = None
    """How much each token counts, 0 where it is not supervised; None where every supervised one counts once."""
    part: int = 0
    """Which example of its row it is, from 0: a row may become several."""


class _Tokens(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, ...]] | None
    """Where each token begins and ends, in characters; None from a slow tokenizer."""


def format_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Conversation,
    tools: Sequence[Any] | None = None,
    options: dict[str, Any] | None = None,
    *,
    reasoning: Reasoning = "keep",
    date: str | None = None,
) -> list[int]:
    """Token ids of ``messages`` and of the start of an answer, as in training.

    Args:
        tokenizer: as used for training.
        messages: the conversation so far; the last turn is the user's, or a tool's.
        tools: JSON schemas of the tools that the assistant may call.
        options: further variables of the template.
        reasoning: "drop" leaves that of earlier answers out.
        date: see :class:`~lit_lora.data.chats.chat_template.ChatTemplate`.

    Raises:
        ValueError: if the template refuses the messages.
    """
    template = ChatTemplate(tokenizer, date)
    example = Example(0, messages, list(tools) if tools else None, options)
    with template.limit([messages]):
        try:
            turns = TemplateNeeds(template).adapted(example, Problems(""), reasoning)
            text = template.render(turns, example.tools, options, generation=True)
        except BadRow as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"{template.name} cannot render these messages ({roles}): {error}") from error
    return _tokenize(tokenizer, [text])[0].ids


def last_answer(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The last answer of a conversation as a model writes it: its text and tool calls, without reasoning and end.

    Args:
        tokenizer: as used for training.
        example: of a conversation that ends with an answer.

    Raises:
        ValueError: if the template cannot show it.
    """
    assert not isinstance(example.content, str)
    answer = example.content[-1]
    if not answer.get("tool_calls"):
        return without_thinking(answer["content"]).strip()
    problems, turns = Problems("the conversation"), [*example.content[:-1], {**answer, "weight": 1.0}]
    encoded = encode_examples(
        tokenizer,
        [example._replace(content=turns)],
        problems,
        max_length=sys.maxsize,
        train_on_turns="last",
        reasoning="drop",
    )
    if problems.count:
        raise ValueError(problems.shown[0])
    learned = [token for token, is_learned in zip(encoded[-1].ids, encoded[-1].mask, strict=True) if is_learned]
    return str(tokenizer.decode(learned, skip_special_tokens=True)).strip()


def format_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of plain text that goes on, as in training: with what the tokenizer begins a text with, without an end.

    Args:
        tokenizer: as used for training.
        text: plain text.
    """
    ids = list(run_tokenizer(tokenizer, text)["input_ids"])
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    problems: Problems,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    train_on_turns: TrainOnTurns = "all",
    reasoning: Reasoning = "keep",
    long_rows: LongRows = "truncate",
    ignore: Collection[str] = (),
    date: str | None = None,
) -> list[Encoded]:
    """Tokenize a batch of examples and mark what is supervised: any examples of a source, in any process.

    Every assistant turn is supervised up to and including the token that ends it; a text is supervised whole. An
    example ends with an end-of-sequence token, which is added where the template has no end token, and what the
    template writes after the last end is cut off.

    Args:
        tokenizer: fast ones are asked for character offsets; slow ones are run on each prefix.
        examples: conversations and texts.
        problems: takes the examples that the template refuses, and counts what is not taken as it is.
        max_length: longest example in tokens.
        train_on_prompt: supervise all tokens of a conversation.
        train_on_turns: supervise all answers or the last one.
        reasoning: supervise reasoning, show it unsupervised, or leave it out.
        long_rows: examples over ``max_length``: cut off their end (so some may keep no supervised token), leave them
            out, or make several of them.
        ignore: keys of turns that are known not to be used.
        date: see :class:`~lit_lora.data.chats.chat_template.ChatTemplate`.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token.
    """
    check_end_of_sequence(tokenizer)
    options: dict[str, Any] = {
        "train_on_prompt": train_on_prompt,
        "train_on_turns": train_on_turns,
        "reasoning": reasoning,
        "ignore": ignore,
        "date": date,
    }
    encoded: list[Encoded] = []
    for example, texts in zip(examples, _tokenized(tokenizer, examples, problems, **options), strict=True):
        fitting: list[Encoded] = []
        if long_rows == "split" and any(len(whole.ids) > max_length for whole in texts):
            fitting = _split(tokenizer, example, texts, problems, max_length=max_length, **options)
        for whole in [] if fitting else texts:
            if long_rows == "drop" and len(whole.ids) > max_length:
                problems.note("longer than max_length: left out")
            else:
                fitting.append(_truncated(whole, max_length))
        encoded += [part._replace(part=number) for number, part in enumerate(fitting)]
    return encoded


def _tokenized(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    problems: Problems,
    *,
    date: str | None,
    **options: Any,
) -> list[list[Encoded]]:
    """Of each example what it becomes, however long."""
    template = ChatTemplate(tokenizer, date)
    read: list[list[LearnedText]] = []
    with template.limit([example.content for example in examples]):
        reader: ChatReader | None = None
        for example in examples:
            texts: list[LearnedText] = []
            if not isinstance(example.content, str):
                reader = reader or ChatReader(template, problems, **options)
                try:
                    texts = reader.read(example)
                except BadRow as error:
                    problems.add(example.line, f"{template.name} cannot render it: {error}")
                if template.writes_date(example.tools):
                    problems.note(f"the chat template writes the date: it is {date} for all of a run")
            read.append(texts)
    tokens = iter(_tokenize(tokenizer, [learned.text for texts in read for learned in texts]))
    return [
        [_encode_text(tokenizer, example.line, example.content)]
        if isinstance(example.content, str)
        else [_masked(tokenizer, example.line, learned, next(tokens)) for learned in texts]
        for example, texts in zip(examples, read, strict=True)
    ]


def _split(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    texts: Sequence[Encoded],
    problems: Problems,
    *,
    max_length: int,
    **options: Any,
) -> list[Encoded]:
    """What a long example becomes in several parts; empty where it can have no parts."""
    if isinstance(example.content, str):
        (whole,) = texts
        problems.note("longer than max_length: split")
        return [
            Encoded(whole.line, whole.ids[a:b], [False] + [True] * (b - a - 1), False)
            for a, b in chunks(whole.ids, max_length)
        ]
    parts = halves(example, last_only=options["train_on_turns"] == "last")
    if not parts:
        return []
    problems.note("longer than max_length: split")
    found = Problems(problems.source)
    encoded = encode_examples(tokenizer, parts, found, max_length=max_length, long_rows="split", **options)
    found.notes.clear()  # they have been counted of the whole
    problems.merge(found)
    return encoded


def _masked(tokenizer: PreTrainedTokenizerBase, line: int, learned: LearnedText, tokens: _Tokens) -> Encoded:
    """The ids, and which of them are supervised."""
    tokens = _parted(tokenizer, learned, tokens)
    position = _positions(tokenizer, learned.text, tokens)
    ids = tokens.ids
    mask = [False] * len(ids)
    weights = None if all(span.weight == 1 for span in learned.spans) else [0.0] * len(ids)
    for start, end, weight in learned.spans:
        first, stop = position(start), position(end)
        mask[first:stop] = [True] * (stop - first)
        if weights is not None:
            weights[first:stop] = [weight] * (stop - first)
    if learned.needs_end and learned.spans:
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
        weights = None if weights is None else [*weights, learned.spans[-1].weight]
    mask[:1] = [False][: len(ids)]
    if weights is not None:
        weights[:1] = [0.0][: len(ids)]
    return Encoded(line, ids, mask, False, weights)


def _parted(tokenizer: PreTrainedTokenizerBase, learned: LearnedText, tokens: _Tokens) -> _Tokens:
    """The tokens, where none reaches over the end of a prompt: a model goes on from the prompt's own tokens."""
    if tokens.offsets is None:
        return tokens
    first = [bisect_left(tokens.offsets, (border,)) for border in learned.borders]
    over = [b for b, k in zip(learned.borders, first, strict=True) if k and tokens.offsets[k - 1][1] > b]
    if not over:
        return tokens
    ids: list[int] = []
    offsets: list[tuple[int, ...]] = []
    for start, end in itertools.pairwise([0, *over, len(learned.text)]):
        part = (
            _continued(tokenizer, learned.text[start:end]) if start else _tokenize(tokenizer, [learned.text[:end]])[0]
        )
        assert part.offsets is not None
        ids += part.ids
        offsets += [(a + start, b + start) for a, b in part.offsets]
    # Some tokenizers cannot go on from any place: a token of theirs swallows white space, or begins with some.
    return _Tokens(ids, offsets) if tokenizer.decode(ids) == tokenizer.decode(tokens.ids) else tokens


def _continued(tokenizer: PreTrainedTokenizerBase, text: str) -> _Tokens:
    """Tokens of text that goes on: after a line break, where no tokenizer puts a space in front."""
    before, after = _tokenize(tokenizer, ["\n", f"\n{text}"])
    count = len(before.ids)
    if after.ids[:count] != before.ids or after.offsets is None:
        return _tokenize(tokenizer, [text])[0]
    return _Tokens(after.ids[count:], [(max(0, a - 1), b - 1) for a, b in after.offsets[count:]])


def _positions(tokenizer: PreTrainedTokenizerBase, text: str, tokens: _Tokens) -> Callable[[int], int]:
    """A function from a character to the first token that starts at or after it."""
    if (offsets := tokens.offsets) is not None:
        return lambda character: bisect_left(offsets, (character,))

    def position(character: int) -> int:
        prefix = _tokenize(tokenizer, [text[:character]])[0].ids
        return common_length(tokens.ids, prefix)

    return position


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[_Tokens]:
    """Ids, and with a fast tokenizer where each token stands. Rendered text brings its own BOS."""
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False}
    if not tokenizer.is_fast:
        return [_Tokens(ids, None) for ids in run_tokenizer(tokenizer, texts, **options)["input_ids"]]
    output = run_tokenizer(tokenizer, texts, return_offsets_mapping=True, **options)
    return [_Tokens(*pair) for pair in zip(output["input_ids"], output["offset_mapping"], strict=True)]


def _encode_text(tokenizer: PreTrainedTokenizerBase, line: int, text: str) -> Encoded:
    ids = [*format_text(tokenizer, text), tokenizer.eos_token_id]
    return Encoded(line, ids, [False] + [True] * (len(ids) - 1), False)


def _truncated(whole: Encoded, max_length: int) -> Encoded:
    """At most ``max_length`` tokens, without an unsupervised end, which no prediction would look at."""
    stop = min(len(whole.ids), max_length)
    while stop and not whole.mask[stop - 1]:
        stop -= 1
    weights = None if whole.weights is None else whole.weights[:stop]
    return Encoded(whole.line, whole.ids[:stop], whole.mask[:stop], len(whole.ids) > max_length, weights)
