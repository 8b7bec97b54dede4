"""From examples to token ids and a mask of the supervised ones.

The prompt is told from the answer by prefix difference: the chat template renders the conversation up to an assistant
turn and the whole of it, and what follows the first in the second is that turn. Positions are compared as characters
of the rendered text, so a token that straddles the border counts as prompt. No template needs generation markers for
this, and nothing is masked by token id, so ``pad_token == eos_token`` is harmless.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from lit_lora.base.whole_model import is_panic
from lit_lora.data.conversation import BadRow, Conversation
from lit_lora.data.formats import Example
from lit_lora.data.sources import Problems
from lit_lora.files.compute_limit import LimitExceeded, compute_limit
from lit_lora.wording import in_words_of

ALPACA_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% else %}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
"""For tokenizers without a chat template: the layout of Stanford Alpaca, with an end token after each answer."""


RENDER_LIMIT_S = 5.0
RENDER_LIMIT_BYTES = 2 * 2**30
"""What rendering may take, beside some for each example and character: sound templates need a thousandth of it."""


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
    """Which example of its row it is, from 0: a row may be split into several."""


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to render with: None for the tokenizer's own, else the built-in Alpaca template."""
    if tokenizer.chat_template:
        return None
    return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + ALPACA_TEMPLATE


def _template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        return "the built-in chat template"
    return f"the chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "the chat template"


def format_prompt(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> list[int]:
    """Token ids of ``messages`` and of the start of an answer, as in training.

    Args:
        tokenizer: as used for training.
        messages: the conversation so far; the last turn is the user's.

    Raises:
        ValueError: if the template refuses the messages.
    """
    with render_limit(tokenizer, [messages]):
        try:
            text = render(tokenizer, chat_template(tokenizer), messages, generation=True)
        except BadRow as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"{_template_name(tokenizer)} cannot render these messages ({roles}): {error}") from error
    return _tokenize(tokenizer, [text])[0][0]


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
    train_on_turns: Literal["all", "last"] = "all",
    reasoning: Literal["keep", "mask", "drop"] = "keep",
    long_rows: Literal["truncate", "drop", "split"] = "truncate",
    ignore: Collection[str] = (),
) -> list[Encoded]:
    """Tokenize a batch of examples and mark what is supervised.

    Every assistant turn is supervised up to and including the token that ends it; a text is supervised whole. An
    example ends with an end-of-sequence token, which is added where the template adds none, and what the template
    writes after it is cut off. Examples longer than ``max_length`` lose their end, so some may keep no supervised
    token.

    Args:
        tokenizer: fast ones are asked for character offsets; slow ones are run on each prefix.
        examples: conversations and texts.
        problems: takes the examples that the template refuses.
        max_length: longest example in tokens.
        train_on_prompt: supervise all tokens of a conversation.

    Raises:
        ValueError: if the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, so nothing would teach the model to stop: "
            + in_words_of(
                python="set tokenizer.eos_token to the token that ends a turn",
                command_line="name the token that ends a turn as eos_token in its tokenizer_config.json",
            )
        )
    template = chat_template(tokenizer)
    enders = end_tokens(tokenizer)
    encoded: dict[int, Encoded] = {}
    chats: list[tuple[int, Example, str, list[tuple[int, int]]]] = []
    with render_limit(tokenizer, [example.content for example in examples]):
        for position, example in enumerate(examples):
            if isinstance(example.content, str):
                encoded[position] = _encode_text(tokenizer, example.line, example.content, max_length)
                continue
            try:
                text = render(tokenizer, template, example.content)
                chats.append((position, example, text, _assistant_spans(tokenizer, template, example.content, text)))
            except BadRow as error:
                problems.add(example.line, f"{_template_name(tokenizer)} cannot render it: {error}")
    tokenized = _tokenize(tokenizer, [text for _, _, text, _ in chats])
    for (position, example, text, spans), (ids, starts) in zip(chats, tokenized, strict=True):
        ends_with_answer = example.content[-1]["role"] == "assistant"  # type: ignore[index]
        ids, mask = _mask(tokenizer, text, ids, starts, spans, enders, ends_with_answer, train_on_prompt)
        assert any(token in enders for token, supervised in zip(ids, mask, strict=True) if supervised)
        encoded[position] = _truncated(example.line, ids, mask, max_length)
    return [encoded[position] for position in sorted(encoded)]


def run_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> Any:
    """``tokenizer(text)``.

    Raises:
        ValueError: naming it, where its Rust code fails: of an expression that takes too long, for example.
    """
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        if not is_panic(error):
            raise
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(
            f"the tokenizer {name} fails on the text: {error!s:.500}. Take it from another source"
        ) from error


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that can end a turn: the end-of-sequence token and the special tokens without another role."""
    others = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return (special - others) | {tokenizer.eos_token_id}


def render_limit(
    tokenizer: PreTrainedTokenizerBase, contents: Sequence[Conversation | str]
) -> AbstractContextManager[None]:
    """For the templates of these contents: one that loops without end, or doubles a text over and over, is stopped."""
    texts = [
        text for turns in contents for text in ([turns] if isinstance(turns, str) else [t["content"] for t in turns])
    ]
    num_characters = sum(map(len, texts))
    name = _template_name(tokenizer)
    templates = tokenizer.chat_template or ""
    if any(map(_raises_to_powers, templates.values() if isinstance(templates, dict) else [templates])):
        raise ValueError(f"{name} raises to a power (**), which can go on without end: remove it")
    message = (
        f"{name} does not come to an end on {len(contents)} "
        f"{'conversation' if len(contents) == 1 else 'conversations'}, where others take milliseconds: look at its "
        "loops, or take the tokenizer from another source"
    )
    seconds = RENDER_LIMIT_S + 0.01 * len(contents) + 1e-6 * num_characters
    return compute_limit(seconds, message, memory_bytes=RENDER_LIMIT_BYTES + 100 * num_characters)


def _raises_to_powers(template: str) -> bool:
    """Whether it does: one power of large numbers is one operation, which nothing interrupts."""
    before = ""
    try:
        for _, kind, text in Environment().lex(template) if "**" in template else ():
            if kind == "operator" and text == "**" and before not in ("(", ","):  # there it spreads arguments
                return True
            before = before if kind == "whitespace" else text
    except TemplateError:  # of its syntax; rendering it says so
        pass
    return False


def render(
    tokenizer: PreTrainedTokenizerBase, template: str | None, messages: Conversation, *, generation: bool = False
) -> str:
    """The text of a conversation.

    Args:
        tokenizer: as used for training.
        template: from :func:`chat_template`.
        messages: the conversation.
        generation: add the start of an answer.

    Raises:
        BadRow: if the template fails of the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
    except (LimitExceeded, MemoryError):
        raise
    except Exception as error:  # a template is a program and fails like one
        raise BadRow(str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}") from error
    assert isinstance(text, str)
    return text


def _assistant_spans(
    tokenizer: PreTrainedTokenizerBase, template: str | None, conversation: Conversation, full: str
) -> list[tuple[int, int]]:
    """Characters ``[start, end)`` of each assistant turn in the rendered conversation."""
    spans = []
    for index, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        prompt = render(tokenizer, template, conversation[:index], generation=True)
        start = len(prompt)
        if not full.startswith(prompt):
            # Some templates open the answer with more than it has in training, for example "<think>".
            start = _common_length(full, prompt)
            if conversation[index - 1]["content"].strip() not in full[:start]:
                raise BadRow(
                    f"turns 1 to {index} are rendered differently when turn {index + 1} follows, so that prompt and "
                    "answer cannot be told apart: set a chat_template without that, or split the conversation"
                )
        if index == len(conversation) - 1:
            end = len(full)
        else:
            through = render(tokenizer, template, conversation[: index + 1])
            end = len(through) if full.startswith(through) else _end_of_content(full, turn["content"], start, index)
        spans.append((start, end))
    return spans


def _end_of_content(full: str, content: str, start: int, index: int) -> int:
    content = content.strip()
    found = full.find(content, start)
    if found < 0:
        raise BadRow(f"turn {index + 1} is rewritten by the template, so its end cannot be found")
    return found + len(content)


def _mask(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    ids: list[int],
    starts: list[int] | None,
    spans: list[tuple[int, int]],
    enders: set[int],
    ends_with_answer: bool,
    train_on_prompt: bool,
) -> tuple[list[int], list[bool]]:
    """The ids without what follows the last supervised token, and the mask."""
    position = _positions(tokenizer, text, ids, starts)
    mask = [False] * len(ids)
    stop = 0
    for start, end in spans:
        first, stop = position(start), position(end)
        last = next((k for k in range(stop - 1, first - 1, -1) if ids[k] in enders), None)
        if last is not None and _is_space(tokenizer, ids[last + 1 : stop]):
            stop = last + 1
        elif stop < len(ids) and ids[stop] in enders:
            stop += 1
        mask[first:stop] = [True] * (stop - first)
    if ends_with_answer:
        ids, mask = ids[:stop], mask[:stop]
        if ids[-1] not in enders:
            while mask[-1] and _is_space(tokenizer, ids[-1:]):
                ids, mask = ids[:-1], mask[:-1]
            ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    if train_on_prompt:
        mask = [True] * len(ids)
    mask[0] = False
    return ids, mask


def _positions(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], starts: list[int] | None
) -> Callable[[int], int]:
    """A function from a character to the first token that starts at or after it."""
    if starts is not None:
        return lambda character: bisect_left(starts, character)
    return lambda character: _common_length(ids, _tokenize(tokenizer, [text[:character]])[0][0])


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[tuple[list[int], list[int] | None]]:
    """Ids, and with a fast tokenizer the character at which each token starts. Rendered text brings its own BOS."""
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False}
    if not tokenizer.is_fast:
        return [(ids, None) for ids in run_tokenizer(tokenizer, texts, **options)["input_ids"]]
    output = run_tokenizer(tokenizer, texts, return_offsets_mapping=True, **options)
    offsets = output["offset_mapping"]
    return [(ids, [start for start, _ in spans]) for ids, spans in zip(output["input_ids"], offsets, strict=True)]


def _encode_text(tokenizer: PreTrainedTokenizerBase, line: int, text: str, max_length: int) -> Encoded:
    ids = [*format_text(tokenizer, text), tokenizer.eos_token_id]
    mask = [False] + [True] * (len(ids) - 1)
    return _truncated(line, ids, mask, max_length)


def _truncated(line: int, ids: list[int], mask: list[bool], max_length: int) -> Encoded:
    """At most ``max_length`` tokens, without an unsupervised end, which no prediction would look at."""
    stop = min(len(ids), max_length)
    while stop and not mask[stop - 1]:
        stop -= 1
    return Encoded(line, ids[:stop], mask[:stop], len(ids) > max_length)


def _is_space(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bool:
    return not ids or not str(tokenizer.decode(ids)).strip()


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and run_tokenizer(tokenizer, "a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
