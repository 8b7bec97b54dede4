"""``lit-lora evaluate``: exact match and loss on held-out examples, before and after fine-tuning."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_lora.config import QuantizationConfig

if TYPE_CHECKING:
    from lit_lora.base.trained_on import TrainedOn
    from lit_lora.data.formats import Examples
    from lit_lora.data.prepare import SourceSettings
    from lit_lora.evaluation.load import Loaded


def evaluate(
    data: str,
    adapter: str,
    base: str | None = None,
    revision: str | None = None,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto",
    columns: dict[str, str] | None = None,
    max_length: int | None = None,
    train_on_prompt: bool | None = None,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 25,
    show: int = 3,
    min_gain: float = 0.0,
    on_bad_rows: Literal["error", "drop"] = "error",
    output: str | None = None,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Measure exact match and loss on held-out examples, without and with the adapter.

    The expected answer is each conversation's last assistant turn; surrounding white space does not count. The loss is
    the mean over target tokens, those of all assistant turns, as in validation. Plain text has a loss only.

    Args:
        data: file of held-out examples, in any format that training reads.
        adapter: folder of an adapter in PEFT's format.
        base: base model, as in --model.base; by default the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the adapter names.
        quantization: how to quantize the base, such as --quantization.bits 4; by default as the adapter was trained.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: dtype of the base's weights; by default as the adapter was trained.
        tokenizer: name or folder of another tokenizer than the adapter's.
        format: format of the data, as in --data.format; auto takes that of the training data where it fits.
        columns: column of each field where they differ, as in --data.columns; by default as trained, where that fits.
        max_length: tokens of an example that the loss looks at; by default as trained, or 1024.
        train_on_prompt: count prompts in the loss too; by default as trained.
        limit: examples to measure on; all if not given.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts at a time.
        show: examples to print in full.
        min_gain: fail unless exact match rises by this much, in percentage points.
        on_bad_rows: "error" to refuse data with bad rows, "drop" to go on without them.
        output: file to write the scores and answers to, as JSON.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    from lit_lora.adapters.merge import disable_lora
    from lit_lora.cli.shipped import shipped
    from lit_lora.data.prepare import SourceSettings
    from lit_lora.data.sources import existing_file, is_file_source
    from lit_lora.evaluation.load import load_for_inference, mean_loss
    from lit_lora.interchange.adapter_folder import folder_record, local_folder

    for name, value in {"limit": limit, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not math.isfinite(min_gain):
        raise ValueError(f"min_gain must be a finite number of percentage points, got {min_gain}")
    data = shipped(data) or data
    if is_file_source(data):
        existing_file(data)
    adapter = local_folder(adapter)
    record = folder_record(adapter)
    settings = SourceSettings(
        format=format,
        columns=columns,
        max_length=max_length or record.max_length or SourceSettings.max_length,
        train_on_prompt=bool(record.train_on_prompt) if train_on_prompt is None else train_on_prompt,
        on_bad_rows=on_bad_rows,
    )
    examples = _read(data, settings, record)
    examples = replace(examples, items=examples.items[:limit])
    if examples.format == "text" and min_gain:
        raise ValueError(f"--min_gain is about exact match, and {data} holds plain text, which asks for no answers")
    prompts, expected = _conversations(data, examples)
    loaded = load_for_inference(
        base,
        adapter,
        revision=revision,
        quantization=quantization,
        full_precision=full_precision,
        dtype=dtype,
        tokenizer=tokenizer,
        other_base=other_base,
        trust_remote_code=trust_remote_code,
    )

    def loss() -> float:
        return mean_loss(
            loaded.model,
            loaded.tokenizer,
            examples,
            max_length=settings.max_length,
            train_on_prompt=settings.train_on_prompt,
            batch_size=batch_size,
        )

    losses = {"after": loss()}  # first: a loss that is no number needs no answers
    with disable_lora(loaded.model):
        losses["before"] = loss()
    result: dict[str, Any] = {}
    if prompts:
        if record.format == "text":
            print("the adapter was trained on plain text, and is asked in the chat template", file=sys.stderr)
        result = _exact_match(loaded, prompts, expected, max_new_tokens=max_new_tokens, batch_size=batch_size)
        _show(prompts[:show], result)
    result["mean_loss"] = {"before": losses["before"], "after": losses["after"]}
    print(_summary(result, len(examples.items), max_new_tokens))
    if output is not None:
        from lit_lora.files.atomic import atomic_write

        content = json.dumps(result, ensure_ascii=False, indent=1).encode()
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, lambda file: file.write(content))
    if prompts and result["exact_match"]["after"] - result["exact_match"]["before"] < min_gain:
        raise RuntimeError(
            f"exact match rose by less than {min_gain} percentage points: the adapter did not learn the task"
        )


def _read(data: str, settings: SourceSettings, record: TrainedOn) -> Examples:
    """The examples, read as the training data was where they have its columns and nothing else is asked for."""
    from lit_lora.data.formats import resolve_columns
    from lit_lora.data.prepare import read_examples
    from lit_lora.data.sources import Problems, read_rows

    if settings.format == "auto" and settings.columns is None and record.format is not None:
        row = next(iter(read_rows(data, Problems(data))), None)
        try:
            resolve_columns(row.fields if row is not None else [], record.format, record.columns)
        except ValueError:  # data of another layout: told by its own columns
            pass
        else:
            settings = replace(settings, format=record.format, columns=record.columns)
    return read_examples(data, settings)


def _conversations(data: str, examples: Examples) -> tuple[list[list[dict[str, str]]], list[str]]:
    """Prompts and expected answers; none of plain text."""
    prompts, expected = [], []
    for example in examples.items:
        messages = example.content
        if isinstance(messages, str):
            continue
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{data}: a conversation does not end with the assistant's turn, so nothing is expected")
        prompts.append(messages[:-1])
        expected.append(messages[-1]["content"].strip())
    return prompts, expected


def _exact_match(
    loaded: Loaded,
    prompts: Sequence[list[dict[str, str]]],
    expected: list[str],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """Answers without and with the adapter, the share that is right in percent, and how many were cut."""
    from lit_lora.adapters.merge import disable_lora
    from lit_lora.data.tokenize import format_prompt
    from lit_lora.data.turn_end import turn_end
    from lit_lora.evaluation.generation import Completion, complete

    model, tokenizer, _ = loaded
    ids, end = [format_prompt(tokenizer, messages) for messages in prompts], turn_end(tokenizer)

    def answers(name: str) -> list[Completion]:
        def progress(done: int) -> None:
            print(f"\r{name}: {done}/{len(ids)}", end="\n" if done == len(ids) else "", file=sys.stderr)

        return complete(
            model, tokenizer, ids, end=end, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )

    with disable_lora(model):
        written = {"before": answers("without the adapter")}
    written["after"] = answers("with the adapter")
    texts = {name: [answer.text.strip() for answer in got] for name, got in written.items()}
    right = {name: sum(got == want for got, want in zip(texts[name], expected, strict=True)) for name in texts}
    return {
        "exact_match": {name: 100 * number / len(expected) for name, number in right.items()},
        "cut": {name: sum(answer.cut for answer in got) for name, got in written.items()},
        "expected": expected,
        **texts,
    }


def _show(prompts: Sequence[list[dict[str, str]]], result: dict[str, Any]) -> None:
    for index, messages in enumerate(prompts):
        shown = {"request": messages[-1]["content"], **{n: result[n][index] for n in ("expected", "before", "after")}}
        print("", *(f"{name:<10}{' '.join(text.split())[:160]}" for name, text in shown.items()), sep="\n")


def _summary(result: dict[str, Any], num_examples: int, max_new_tokens: int) -> str:
    lines = [""]
    if "exact_match" in result:
        before, after = result["exact_match"]["before"], result["exact_match"]["after"]
        lines.append(f"exact match on {num_examples} held-out examples: {before:.1f} % before, {after:.1f} % after")
        if any(result["cut"].values()):
            before, after = result["cut"]["before"], result["cut"]["after"]
            lines.append(
                f"{before} before and {after} after of {num_examples} answers were cut at "
                f"max_new_tokens={max_new_tokens}: a cut answer counts as wrong unless it is right as it is"
            )
    before, after = result["mean_loss"]["before"], result["mean_loss"]["after"]
    lines.append(f"mean loss per target token: {before:.3f} before, {after:.3f} after")
    return "\n".join(lines)
