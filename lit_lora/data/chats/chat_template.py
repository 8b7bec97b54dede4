"""A tokenizer's chat template: a program from elsewhere that writes a conversation as text, run under a limit.

A tokenizer without one gets the layout of Stanford Alpaca. That is the only template of ours: whatever is to be known
of another one is found by rendering with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, cast

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lit_lora.base.whose_error import is_panic
from lit_lora.data.chats.conversation import BadRow, Conversation
from lit_lora.data.chats.stopped_clock import CLOCK, stopped_clock
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
"""What rendering may take, beside some for each turn and character: sound templates need a thousandth of it."""

_LARGE = 2**28
"""Characters from which on it is the data that fills the memory, not the template."""


class ChatTemplate:
    """The template that a tokenizer's conversations are written in.

    Args:
        tokenizer: as used for training.
        date: what a template that asks for the time is told, as YYYY-MM-DD; the time itself without one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.date = date
        self.built_in = chat_template(tokenizer)
        """None where the tokenizer has its own."""
        self._is_limited = False

    @property
    def name(self) -> str:
        """For messages."""
        if self.built_in is not None:
            return "the built-in chat template"
        folder = self.tokenizer.name_or_path
        return f"the chat template of {folder}" if folder else "the chat template"

    def source(self, tools: Sequence[Any] | None = None) -> str:
        """Its program; a tokenizer may have one of its own for conversations with tools."""
        return self.built_in or self.tokenizer.get_chat_template(None, list(tools) if tools else None)

    def writes_date(self, tools: Sequence[Any] | None = None) -> bool:
        """Whether it asks for the time, and is told :attr:`date`."""
        return self.date is not None and CLOCK in self.words(tools)

    def _program(self, tools: Sequence[Any] | None) -> str | None:
        """What is rendered with; None for the tokenizer's own as it is."""
        if self.date is None or not self.writes_date(tools):
            return self.built_in
        return stopped_clock(self.date) + self.source(tools)

    def words(self, tools: Sequence[Any] | None = None) -> frozenset[str]:
        """The names and strings in its program: what is not among them, it cannot look at."""
        return _words(self.source(tools))

    def render(
        self,
        messages: Conversation,
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        generation: bool = False,
    ) -> str:
        """The text of a conversation, rendered under a limit: within :meth:`limit` under that one.

        Args:
            messages: the conversation.
            tools: JSON schemas of the tools that the assistant may call.
            options: further variables of the template.
            generation: add the start of an answer.

        Raises:
            BadRow: if the template fails of them.
        """
        with self._running(messages):
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,  # type: ignore[arg-type]
                chat_template=self._program(tools),
                tokenize=False,
                add_generation_prompt=generation,
                **(options or {}),
            )
        assert isinstance(text, str)
        return text

    def marks(self, tools: Sequence[Any] | None = None) -> bool:
        """Whether it says itself what the assistant generates, in blocks of ``{% generation %}``."""
        return "generation" in self.words(tools)

    def marked_spans(
        self, messages: Conversation, tools: Sequence[Any] | None = None, options: Mapping[str, Any] | None = None
    ) -> list[tuple[int, int]]:
        """Characters ``[start, end)`` of what :meth:`render` gives that the template says the assistant generates."""
        with self._running(messages):
            _, spans = cast(Any, render_jinja_template)(
                [messages],
                tools=tools,
                chat_template=self._program(tools) or self.source(tools),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **(options or {})},
            )
        return list(spans[0])

    @contextmanager
    def _running(self, messages: Conversation) -> Iterator[None]:
        """Within, its program runs: under a limit, and how it fails is told as a row's."""
        with nullcontext() if self._is_limited else self.limit([messages]):
            try:
                yield
            except (LimitExceeded, MemoryError):
                raise
            except Exception as error:  # a template is a program and fails like one
                raise BadRow(_said(error)) from error

    @contextmanager
    def limit(self, contents: Sequence[Any]) -> Iterator[None]:
        """For rendering these contents: a template that loops without end, or doubles a text over and over, is stopped.

        What is rendered one by one has such a limit anyhow; this is one for all of them, set once.

        Raises:
            ValueError: if it raises to powers.
        """
        num_characters = sum(map(_size, contents))
        num_turns = sum(1 if isinstance(content, str) else len(content) for content in contents)
        templates = self.tokenizer.chat_template or ""
        if any(map(_raises_to_powers, templates.values() if isinstance(templates, dict) else [templates])):
            raise ValueError(f"{self.name} raises to a power (**), which can go on without end: remove it")
        message = (
            f"{self.name} does not come to an end on {len(contents)} "
            f"{'conversation' if len(contents) == 1 else 'conversations'}, where others take milliseconds: look at its "
            "loops, or take the tokenizer from another source"
        )
        seconds = RENDER_LIMIT_S + 0.01 * num_turns + 1e-6 * num_characters
        memory = None if num_characters > _LARGE else RENDER_LIMIT_BYTES + 100 * num_characters
        was_limited, self._is_limited = self._is_limited, True
        try:
            with compute_limit(seconds, message, memory_bytes=memory):
                yield
        finally:
            self._is_limited = was_limited


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template to render with: None for the tokenizer's own, else the built-in Alpaca template."""
    if tokenizer.chat_template:
        return None
    return ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + ALPACA_TEMPLATE


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


def check_end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that there is a token to end with.

    Raises:
        ValueError: if there is none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, so nothing would teach the model to stop: "
            + in_words_of(
                python="set tokenizer.eos_token to the token that ends a turn",
                command_line="name the token that ends a turn as eos_token in its tokenizer_config.json",
            )
        )


def common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How long two texts or lists agree from their beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"


def _size(value: Any) -> int:
    """Characters of all text in it, however deeply nested."""
    size, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return size


@lru_cache(maxsize=16)
def _words(source: str) -> frozenset[str]:
    try:
        tokens = list(Environment().lex(source))
    except TemplateError:  # of its syntax; rendering it says so
        return frozenset()
    return frozenset(text.strip("'\"") for _, kind, text in tokens if kind in ("name", "string"))


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


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and run_tokenizer(tokenizer, "a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
