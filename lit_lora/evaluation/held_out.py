"""Held-out examples, read as the training data was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_lora.base.trained_on import TrainedOn
from lit_lora.data.chats.formats import Examples, resolve_columns
from lit_lora.data.chats.template_needs import without_thinking
from lit_lora.data.chats.tokenize import last_answer
from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from lit_lora.data.rows.sources import Problems, existing_file, is_file_source, read_rows
from lit_lora.files.shipped import shipped


class HeldOut(NamedTuple):
    """Examples to measure on."""

    examples: Examples
    prompts: list[list[dict[str, Any]]]
    """Of conversations, without the last answer; none of plain text."""
    expected: list[str]
    """The last answer of each, without its reasoning; of a tool call what the template makes of it is expected."""
    max_length: int
    """Tokens of an example that the loss looks at."""
    train_on_prompt: bool
    """Whether prompts count in the loss."""
    train_on_turns: Literal["all", "last"] = "all"
    """Which answers do."""
    reasoning: Literal["keep", "mask", "drop"] = "keep"
    """Whether reasoning does, or is left out."""


def read_held_out(
    data: str,
    record: TrainedOn = TrainedOn(),  # noqa: B008 (frozen)
    *,
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto",
    columns: dict[str, str] | None = None,
    max_length: int | None = None,
    train_on_prompt: bool | None = None,
    limit: int | None = None,
    on_bad_rows: Literal["error", "drop"] = "error",
) -> HeldOut:
    """Read examples, as the training data was read where they have its columns and nothing else is asked for.

    Args:
        data: file, or data that ships; in any format that training reads.
        record: what the adapter was trained with.
        format: of the data; "auto" takes that of the training data where it fits.
        columns: column of each field where they differ; by default as trained, where that fits.
        max_length: tokens of an example that the loss looks at; by default as trained, or 1024.
        train_on_prompt: count prompts in the loss too; by default as trained.
        limit: examples to take; all if None.
        on_bad_rows: "error" to refuse data with bad rows, "drop" to skip them.

    Raises:
        ValueError: for bad rows, or a conversation that does not end with an answer.
        FileNotFoundError: if there is no such file.
    """
    data = shipped(data) or data
    if is_file_source(data):
        existing_file(data)
    settings = SourceSettings(
        format=format,
        columns=columns,
        max_length=max_length or record.max_length or SourceSettings.max_length,
        train_on_prompt=bool(record.train_on_prompt) if train_on_prompt is None else train_on_prompt,
        on_bad_rows=on_bad_rows,
        train_on_turns="last" if record.train_on_turns == "last" and not train_on_prompt else "all",
        reasoning="drop" if record.reasoning == "drop" else "mask" if record.reasoning == "mask" else "keep",
    )
    examples = _read(data, settings, record)
    examples = replace(examples, items=examples.items[:limit])
    prompts, expected = _conversations(data, examples)
    return HeldOut(
        examples,
        prompts,
        expected,
        settings.max_length,
        settings.train_on_prompt,
        settings.train_on_turns,
        settings.reasoning,
    )


def _read(data: str, settings: SourceSettings, record: TrainedOn) -> Examples:
    """The examples, read as the training data was where they have its columns and nothing else is asked for."""
    if settings.format == "auto" and settings.columns is None and record.format is not None:
        row = next(iter(read_rows(data, Problems(data))), None)
        try:
            resolve_columns(row.fields if row is not None else [], record.format, record.columns)
        except ValueError:  # data of another layout: told by its own columns
            pass
        else:
            settings = replace(settings, format=record.format, columns=record.columns)
    return read_examples(data, settings)


def _conversations(data: str, examples: Examples) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """Prompts and expected answers; none of plain text."""
    prompts, expected = [], []
    for example in examples.items:
        messages = example.content
        if isinstance(messages, str):
            continue
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{data}: a conversation does not end with the assistant's turn, so nothing is expected")
        prompts.append(messages[:-1])
        expected.append(without_thinking(messages[-1]["content"]).strip())
    return prompts, expected


def with_calls(tokenizer: PreTrainedTokenizerBase, held_out: HeldOut) -> HeldOut:
    """The same, where answers that are tool calls are expected as the template writes them."""
    expected = [
        last_answer(tokenizer, example) if example.content[-1].get("tool_calls") else answer  # type: ignore[union-attr]
        for answer, example in zip(held_out.expected, held_out.examples.items, strict=False)  # none of plain text
    ]
    return held_out._replace(expected=expected)
