"""Answers of a model, given as its adapter was trained: through the chat template, or by continuing plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import TextStreamer

from lit_lora.data.chats.tokenize import format_prompt, format_text
from lit_lora.data.chats.turn_end import TurnEnd, is_hidden, text_end, turn_end
from lit_lora.evaluation.load import Loaded
from lit_lora.language_model.generation import Completion, complete
from lit_lora.wording import setting

Prompt = str | Sequence[dict[str, Any]]
"""A user's message (or the beginning of a text), or the turns of a conversation that ends with the user's."""


def generate(
    loaded: Loaded,
    prompts: Prompt | Sequence[Prompt],
    *,
    format: Literal["auto", "chat", "text"] = "auto",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 16,
    stream: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[Completion]:
    """Answer prompts.

    Args:
        loaded: from :func:`lit_lora.load`.
        prompts: one, or several.
        format: "chat" writes a prompt into the chat template, "text" continues it; "auto" does as the adapter was
            trained.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for the most likely token each time; above 0 to sample.
        top_p: sample from the smallest set of tokens of this total probability.
        seed: for sampling.
        batch_size: prompts at a time.
        tools: JSON schemas of the tools that may be called, shown as the chat template shows them.
        stream: print the answer to a single prompt as it comes, or where its end is known only then, when it is there.

    Returns:
        An answer for each prompt, in their order.

    Raises:
        ValueError: for settings that cannot be, or a prompt with a token that the model does not know.
    """
    check_sampling(temperature, top_p, seed, max_new_tokens)
    several = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)) else prompts
    ids, end = _written(loaded, several, plain=continues_text(loaded, format), tools=tools)  # type: ignore[arg-type]
    if stream and len(ids) != 1:
        raise ValueError(f"one answer can be shown as it comes, and {len(ids)} are asked for: leave out stream")
    streams = stream and is_hidden(loaded.tokenizer, end)  # what ends an answer is known only once it is there
    if seed is not None:
        torch.manual_seed(seed)
    completions = complete(
        loaded.model,
        loaded.tokenizer,
        ids,
        end=end,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        streamer=TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None,
    )
    if stream and not streams:
        print(completions[0].text)
    return completions


def check_sampling(temperature: float, top_p: float, seed: int | None, max_new_tokens: int) -> None:
    """Check settings of generation by themselves.

    Raises:
        ValueError: naming the one that cannot be.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
    if temperature == 0 and (top_p != 1.0 or seed is not None):
        raise ValueError(
            f"top_p and seed have no effect at temperature 0: set {setting('temperature')}, or leave them out"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")


def continues_text(loaded: Loaded, format: Literal["auto", "chat", "text"]) -> bool:
    """Whether a prompt is continued as text, not answered."""
    return format == "text" or (format == "auto" and loaded.trained_on.format == "text")


def _written(
    loaded: Loaded, prompts: Sequence[Prompt], *, plain: bool, tools: Sequence[dict[str, Any]] | None
) -> tuple[list[list[int]], TurnEnd]:
    """Token ids of the prompts, and what ends an answer to them."""
    tokenizer = loaded.tokenizer
    if not plain:
        turns = [[{"role": "user", "content": p}] if isinstance(p, str) else [*p] for p in prompts]
        drop: Literal["keep", "drop"] = "drop" if loaded.trained_on.reasoning == "drop" else "keep"
        ids = [format_prompt(tokenizer, messages, tools, reasoning=drop) for messages in turns]
        return ids, turn_end(tokenizer)
    if tools:
        raise ValueError(f"tools have no place in plain text: {setting('format', 'chat')} has one")
    if conversations := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise ValueError(
            f"a conversation of {len(conversations[0])} turns has no place in plain text, which the adapter was "
            f"trained on: {setting('format', 'chat')} has one"
        )
    return [format_text(tokenizer, text) for text in prompts if isinstance(text, str)], text_end(tokenizer)
