"""How good a model is on held-out examples, without its adapter and with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.adapters.merge import disable_lora
from lit_lora.base.trained_on import TrainedOn
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.chats.formats import Examples, resolve_columns
from lit_lora.data.chats.template_needs import without_thinking
from lit_lora.data.chats.tokenize import encode_examples, format_prompt, last_answer
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.data.prepared.prepare import SourceSettings, read_examples
from lit_lora.data.rows.sources import Problems, existing_file, is_file_source, read_rows
from lit_lora.evaluation.load import Loaded
from lit_lora.files.shipped import shipped
from lit_lora.language_model.forward import language_model_loss
from lit_lora.language_model.generation import Completion, check_vocabulary, complete
from lit_lora.language_model.trial import choose_path


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


@dataclass(frozen=True)
class Answers:
    """What was written to the prompts."""

    texts: list[str]
    """Without white space around them."""
    exact_match: float
    """Percent that are the expected answer."""
    num_cut: int
    """Of them, still going on at ``max_new_tokens``."""


@dataclass(frozen=True)
class Scores:
    """Before fine-tuning (the adapter switched off) and after."""

    num_examples: int
    loss_before: float
    """Mean over target tokens, those of all assistant turns, in nats; as validation measures it."""
    loss_after: float
    """Likewise, with the adapter."""
    expected: list[str]
    """Answers that were to be given."""
    before: Answers | None
    """None for plain text, which asks for no answers."""
    after: Answers | None
    max_new_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it: plain types."""
        losses = {"mean_loss": {"before": self.loss_before, "after": self.loss_after}}
        if self.before is None or self.after is None:
            return losses
        return {
            "exact_match": {"before": self.before.exact_match, "after": self.after.exact_match},
            "cut": {"before": self.before.num_cut, "after": self.after.num_cut},
            "expected": self.expected,
            "before": self.before.texts,
            "after": self.after.texts,
            **losses,
        }

    def __str__(self) -> str:
        lines = []
        if self.before is not None and self.after is not None:
            lines.append(
                f"exact match on {self.num_examples} held-out examples: {self.before.exact_match:.1f} % before, "
                f"{self.after.exact_match:.1f} % after"
            )
            if self.before.num_cut or self.after.num_cut:
                lines.append(
                    f"{self.before.num_cut} before and {self.after.num_cut} after of {self.num_examples} answers were "
                    f"cut at max_new_tokens={self.max_new_tokens}: a cut answer counts as wrong unless it is right "
                    "as it is"
                )
        lines.append(f"mean loss per target token: {self.loss_before:.3f} before, {self.loss_after:.3f} after")
        return "\n".join(lines)


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


def score(
    loaded: Loaded,
    data: str | HeldOut,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 25,
    progress: Callable[[str, int, int], None] | None = None,
) -> Scores:
    """Measure exact match and loss, without and with the adapter.

    Args:
        loaded: from :func:`lit_lora.load`, with an adapter.
        data: file of examples, or what :func:`read_held_out` made of one.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts at a time.
        progress: called with what is answered ("without the adapter", ...), how many are, and of how many.

    Raises:
        ValueError: if the loss is no number, or the model does not know a token.
    """
    held_out = read_held_out(data, loaded.trained_on) if isinstance(data, str) else data

    def loss() -> float:
        return mean_loss(
            loaded.model,
            loaded.tokenizer,
            held_out.examples,
            max_length=held_out.max_length,
            train_on_prompt=held_out.train_on_prompt,
            train_on_turns=held_out.train_on_turns,
            reasoning=held_out.reasoning,
            batch_size=batch_size,
        )

    after = loss()  # first: a loss that is no number needs no answers
    with disable_lora(loaded.model):
        before = loss()
    answers: list[Answers | None] = [None, None]
    held_out = _with_calls(loaded, held_out)
    if held_out.prompts:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
        with disable_lora(loaded.model):
            answers[0] = _answers(loaded, held_out, "without the adapter", **options)
        answers[1] = _answers(loaded, held_out, "with the adapter", **options)
    num_examples = len(held_out.examples.items)
    return Scores(num_examples, before, after, held_out.expected, answers[0], answers[1], max_new_tokens)


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


def _with_calls(loaded: Loaded, held_out: HeldOut) -> HeldOut:
    """The same, where answers that are tool calls are expected as the template writes them."""
    expected = [
        last_answer(loaded.tokenizer, example) if example.content[-1].get("tool_calls") else answer  # type: ignore[union-attr]
        for answer, example in zip(held_out.expected, held_out.examples.items, strict=False)  # none of plain text
    ]
    return held_out._replace(expected=expected)


def _answers(
    loaded: Loaded,
    held_out: HeldOut,
    name: str,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[str, int, int], None] | None,
) -> Answers:
    model, tokenizer, _ = loaded
    pairs = list(zip(held_out.prompts, held_out.examples.items, strict=True))
    ids = [format_prompt(tokenizer, m, e.tools, e.options, reasoning=held_out.reasoning) for m, e in pairs]
    written: Sequence[Completion] = complete(
        model,
        tokenizer,
        ids,
        end=turn_end(tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=None if progress is None else lambda done: progress(name, done, len(ids)),
    )
    texts = [answer.text.strip() for answer in written]
    # Reasoning is nobody's to match: the answer comes after it.
    right = sum(
        got.rpartition("</think>")[2].strip() == want for got, want in zip(texts, held_out.expected, strict=True)
    )
    return Answers(texts, 100 * right / len(texts), sum(answer.cut for answer in written))


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    train_on_turns: Literal["all", "last"] = "all",
    reasoning: Literal["keep", "mask", "drop"] = "keep",
    batch_size: int = 16,
) -> float:
    """Mean negative log-likelihood of the target tokens of all examples, in nats; as validation measures it.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        examples: conversations and texts.
        max_length: tokens of an example, the rest is cut off.
        train_on_prompt: count the tokens of prompts too.
        train_on_turns: count all answers or the last ones.
        reasoning: count reasoning, show it without counting it, or leave it out.
        batch_size: examples at a time.

    Raises:
        ValueError: if no target is left within ``max_length``, the model does not know a token, or the loss is no
            number.
    """
    encoded = encode_examples(
        tokenizer,
        examples.items,
        examples.problems,
        max_length=max_length,
        train_on_prompt=train_on_prompt,
        train_on_turns=train_on_turns,
        reasoning=reasoning,
    )
    tokenized = [
        TokenizedExample(
            index,
            np.array(example.ids, np.int32),
            np.array(example.mask, np.bool_),
            None if example.weights is None else np.array(example.weights, np.float32),
        )
        for index, example in enumerate(encoded)
        if any(example.mask)
    ]
    if not tokenized:
        raise ValueError(f"none of the {len(encoded)} examples has a target token among its first {max_length}")
    check_vocabulary(model, [example.ids for example in encoded])
    path = choose_path(model)
    nll_sum, num_targets = 0.0, 0.0
    for start in range(0, len(tokenized), batch_size):
        packed: Any = collate_packed(tokenized[start : start + batch_size])
        batch: Any = {name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in packed.items()}
        nll_sum += float(language_model_loss(model, batch, path).nll_sum)
        num_targets += (
            float(batch["target_weights"].sum()) if "target_weights" in batch else batch["target_ids"].numel()
        )
    if not math.isfinite(nll_sum):
        raise ValueError(f"the loss is {nll_sum}: base or adapter holds NaN or infinity, or overflows in {model.dtype}")
    return nll_sum / num_targets
