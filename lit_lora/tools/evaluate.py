"""``lit-lora evaluate``: exact match and loss on held-out examples, before and after fine-tuning."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_lora.config import QuantizationConfig

if TYPE_CHECKING:
    from lit_lora.evaluation.score import HeldOut, Scores


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
        on_bad_rows: "error" to refuse data with bad rows, "drop" to skip them.
        output: file to write the scores and answers to, as JSON.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    for name, value in {"limit": limit, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not math.isfinite(min_gain):
        raise ValueError(f"min_gain must be a finite number of percentage points, got {min_gain}")

    from lit_lora.cli.progress import Counting
    from lit_lora.evaluation.load import load
    from lit_lora.evaluation.score import read_held_out, score
    from lit_lora.interchange.adapter_folder import folder_record, local_folder
    from lit_lora.runs.said import readable

    adapter = local_folder(adapter)
    record = folder_record(adapter)
    held_out = read_held_out(  # before anything is loaded
        data,
        record,
        format=format,
        columns=columns,
        max_length=max_length,
        train_on_prompt=train_on_prompt,
        limit=limit,
        on_bad_rows=on_bad_rows,
    )
    if not held_out.prompts and min_gain:
        raise ValueError(f"--min_gain is about exact match, and {data} holds plain text, which asks for no answers")
    with readable():
        loaded = load(
            adapter,
            base=base,
            revision=revision,
            quantization=quantization,
            full_precision=full_precision,
            dtype=dtype,
            tokenizer=tokenizer,
            other_base=other_base,
            trust_remote_code=trust_remote_code,
        )
    if held_out.prompts and record.format == "text":
        print("the adapter was trained on plain text, and is asked in the chat template", file=sys.stderr)
    with Counting() as progress:
        scores = score(loaded, held_out, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress)
    _show(held_out, scores, show)
    print(f"\n{scores}")
    if output is not None:
        from lit_lora.files.atomic import atomic_write

        content = json.dumps(scores.to_dict(), ensure_ascii=False, indent=1).encode()
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, lambda file: file.write(content))
    if scores.before and scores.after and scores.after.exact_match - scores.before.exact_match < min_gain:
        raise RuntimeError(
            f"exact match rose by less than {min_gain} percentage points: the adapter did not learn the task"
        )


def _show(held_out: HeldOut, scores: Scores, count: int) -> None:
    if scores.before is None or scores.after is None:
        return
    for index, messages in enumerate(held_out.prompts[:count]):
        shown = {
            "request": messages[-1]["content"],
            "expected": scores.expected[index],
            "before": scores.before.texts[index],
            "after": scores.after.texts[index],
        }
        print("", *(f"{name:<10}{' '.join(text.split())[:160]}" for name, text in shown.items()), sep="\n")
