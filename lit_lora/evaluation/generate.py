"""Answers of a model, given as its adapter was trained: through the chat template, or by continuing plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from lit_lora.adapters.mixed_batch import not_mixable
from lit_lora.adapters.named_adapters import active_adapters, check_names
from lit_lora.base.trained_on import TrainedOn
from lit_lora.data.chats.tokenize import format_prompt, format_text
from lit_lora.data.chats.turn_end import TurnEnd, is_hidden, text_end, turn_end
from lit_lora.evaluation.load import Asked, Loaded
from lit_lora.language_model.generation import Completion, complete, counting_on
from lit_lora.wording import setting

BASE = "__base__"
"""In the place of an adapter's name: the base alone. It is PEFT's word."""

Prompt = str | Sequence[dict[str, Any]]
"""A user's message (or the beginning of a text), or the turns of a conversation that ends with the user's."""


def generate(
    loaded: Loaded,
    prompts: Prompt | Sequence[Prompt],
    *,
    adapter_names: str | Sequence[str | None] | None = None,
    format: Literal["auto", "chat", "text"] = "auto",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int | None = None,
    stream: bool = False,
    tools: Sequence[dict[str, Any]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answer prompts.

    Args:
        loaded: from :func:`lit_lora.load`.
        prompts: one, or several.
        adapter_names: the adapter that answers, of those of the model: one for all prompts or one for each, which may
            be mixed in a batch; ``"__base__"`` or None in its place for the base alone. Left out, the active one does.
            Each is asked as it was trained; the base alone as the first one.
        format: "chat" writes a prompt into the chat template, "text" continues it; "auto" does as the adapter was
            trained.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for the most likely token each time; above 0 to sample.
        top_p: sample from the smallest set of tokens of this total probability.
        seed: for sampling.
        batch_size: prompts at a time; by default 25, on a CPU what 16,384 tokens hold.
        tools: JSON schemas of the tools that may be called, shown as the chat template shows them.
        stream: print the answer to a single prompt as it comes, or where its end is known only then, when it is there.
        progress: called with the number of prompts that are answered.

    Returns:
        An answer for each prompt, in their order.

    Raises:
        ValueError: for settings that cannot be, a name that no adapter has, or a prompt with a token that the model
            does not know.
    """
    check_sampling(temperature, top_p, seed, max_new_tokens)
    several = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], dict)) else prompts
    names = _names(loaded.model, adapter_names, len(several))
    groups = _groups(loaded, several, names, format, tools)  # type: ignore[arg-type]
    if stream and len(several) != 1:
        raise ValueError(f"one answer can be shown as it comes, and {len(several)} are asked for: leave out stream")
    if seed is not None:
        torch.manual_seed(seed)
    completions = [Completion("", False)] * len(several)
    num_done = 0
    for group in groups:
        streams = stream and is_hidden(group.tokenizer, group.end)  # what ends an answer is known only once it is there
        found = complete(
            loaded.model,
            group.tokenizer,
            list(group.ids.values()),
            end=group.end,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            temperature=temperature,
            top_p=top_p,
            streamer=TextStreamer(group.tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None,
            progress=counting_on(progress, num_done),
            adapters=None if names is None else [names[index] for index in group.ids],
        )
        num_done += len(found)
        if stream and not streams:
            print(found[0].text)
        for index, completion in zip(group.ids, found, strict=True):
            completions[index] = completion
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


def continues_text(trained_on: TrainedOn, format: Literal["auto", "chat", "text"]) -> bool:
    """Whether a prompt is continued as text, not answered, by what was trained so."""
    return format == "text" or (format == "auto" and trained_on.format == "text")


class _Group(NamedTuple):
    """Prompts that can be in one batch."""

    tokenizer: PreTrainedTokenizerBase
    end: TurnEnd
    ids: dict[int, list[int]]
    """Place of a prompt among all -> its tokens."""


def _names(model: Any, given: str | Sequence[str | None] | None, count: int) -> list[str | None] | None:
    """The adapter of each prompt; None for those that are active."""
    if given is None:
        return None
    names = [given] * count if isinstance(given, str) else list(given)
    if len(names) != count:
        raise ValueError(f"adapter_names has {len(names)} names for {count} prompts: give one for each, or one for all")
    check_names(model, [name for name in names if name not in (None, BASE)])
    return [None if name == BASE else name for name in names]


def _groups(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    names: Sequence[str | None] | None,
    format: Literal["auto", "chat", "text"],
    tools: Sequence[dict[str, Any]] | None,
) -> list[_Group]:
    """The prompts in tokens, as each of the adapters is asked; in groups whose answers end alike."""
    active = active_adapters(loaded.model)
    default = active[0] if len(active) == 1 else None
    several = {name for name in names or () if name is not None} if len({*(names or ())}) > 1 else set()
    alone = not_mixable(loaded.model, sorted(several)) if several else several
    groups: dict[object, _Group] = {}
    for index, prompt in enumerate(prompts):
        name = default if names is None else names[index]
        asked = loaded.asked(name)
        plain = continues_text(asked.trained_on, format)
        key = (id(asked.tokenizer), plain, name if name in alone else None)
        if key not in groups:
            end = text_end(asked.tokenizer) if plain else turn_end(asked.tokenizer)
            groups[key] = _Group(asked.tokenizer, end, {})
        written = _as_text(asked, prompt, tools) if plain else _as_chat(asked, prompt, tools)
        groups[key].ids[index] = written
    return list(groups.values())


def _as_chat(asked: Asked, prompt: Prompt, tools: Sequence[dict[str, Any]] | None) -> list[int]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    reasoning: Literal["keep", "drop"] = "drop" if asked.trained_on.reasoning == "drop" else "keep"
    return format_prompt(asked.tokenizer, turns, tools, reasoning=reasoning)


def _as_text(asked: Asked, prompt: Prompt, tools: Sequence[dict[str, Any]] | None) -> list[int]:
    if tools:
        raise ValueError(f"tools have no place in plain text: {setting('format', 'chat')} has one")
    if not isinstance(prompt, str):
        raise ValueError(
            f"a conversation of {len(prompt)} turns has no place in plain text, which the adapter was "
            f"trained on: {setting('format', 'chat')} has one"
        )
    return format_text(asked.tokenizer, prompt)
