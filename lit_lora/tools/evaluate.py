"""``lit-lora evaluate``: exact match and loss on held-out examples, before and after fine-tuning."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_lora.config import QuantizationConfig

if TYPE_CHECKING:
    from lit_lora.data.formats import Examples


def evaluate(
    data: str,
    adapter: str,
    base: str | None = None,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 25,
    show: int = 3,
    min_gain: float = 0.0,
    on_bad_rows: Literal["error", "drop"] = "error",
    output: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Measure exact match and loss on held-out examples, without and with the adapter.

    The expected answer is each conversation's last assistant turn; surrounding white space does not count. The loss is
    the mean over target tokens, those of all assistant turns, as in validation.

    Args:
        data: file of held-out examples, in any format that training reads.
        adapter: folder of an adapter in PEFT's format.
        base: base model, as in --model.base; by default the one that the adapter names.
        quantization: how to quantize the base, such as --quantization.bits 4; by default as the adapter was trained.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        limit: examples to measure on; all if not given.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts at a time.
        show: examples to print in full.
        min_gain: fail unless exact match rises by this much, in percentage points.
        on_bad_rows: "error" to refuse data with bad rows, "drop" to go on without them.
        output: file to write the scores and answers to, as JSON.
        trust_remote_code: run code that comes with the base.
    """
    from lit_lora.adapters.merge import disable_lora
    from lit_lora.data.prepare import SourceSettings, read_examples
    from lit_lora.data.tokenize import format_prompt
    from lit_lora.tools.inference import generate_all, load_for_inference, mean_loss

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 example, got {limit}")
    if not math.isfinite(min_gain):
        raise ValueError(f"min_gain must be a finite number of percentage points, got {min_gain}")
    settings = SourceSettings(on_bad_rows=on_bad_rows)
    examples = read_examples(data, settings)
    examples = replace(examples, items=examples.items[:limit])
    prompts, expected = _conversations(data, examples)
    model, tokenizer = load_for_inference(
        base,
        adapter,
        quantization=quantization,
        full_precision=full_precision,
        trust_remote_code=trust_remote_code,
    )
    prompt_ids = [format_prompt(tokenizer, messages) for messages in prompts]

    def answers(name: str) -> list[str]:
        def progress(done: int) -> None:
            print(f"\r{name}: {done}/{len(prompts)}", end="\n" if done == len(prompts) else "", file=sys.stderr)

        return [
            text.strip()
            for text in generate_all(
                model,
                tokenizer,
                prompt_ids,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=progress,
            )
        ]

    losses = {"after": mean_loss(model, tokenizer, examples, max_length=settings.max_length, batch_size=batch_size)}
    with disable_lora(model):
        losses["before"] = mean_loss(model, tokenizer, examples, max_length=settings.max_length, batch_size=batch_size)
        before = answers("without the adapter")
    after = answers("with the adapter")
    for index in range(min(show, len(prompts))):
        shown = (prompts[index][-1]["content"], expected[index], before[index], after[index])
        lines = zip(("request", "expected", "before", "after"), shown, strict=True)
        print("", *(f"{name:<10}{' '.join(text.split())[:160]}" for name, text in lines), sep="\n")
    scores = {
        name: 100 * sum(got == want for got, want in zip(texts, expected, strict=True)) / len(expected)
        for name, texts in (("before", before), ("after", after))
    }
    print(
        f"\nexact match on {len(expected)} held-out examples: "
        f"{scores['before']:.1f} % before, {scores['after']:.1f} % after\n"
        f"mean loss per target token: {losses['before']:.3f} before, {losses['after']:.3f} after"
    )
    if output is not None:
        from lit_lora.atomic import atomic_write

        record: dict[str, Any] = {
            "exact_match": scores,
            "mean_loss": losses,
            "expected": expected,
            "before": before,
            "after": after,
        }
        content = json.dumps(record, ensure_ascii=False, indent=1).encode()
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(output, lambda file: file.write(content))
    if scores["after"] - scores["before"] < min_gain:
        raise RuntimeError(
            f"exact match rose by less than {min_gain} percentage points: the adapter did not learn the task"
        )


def _conversations(data: str, examples: Examples) -> tuple[list[list[dict[str, str]]], list[str]]:
    prompts, expected = [], []
    for example in examples.items:
        messages = example.content
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise ValueError(f"{data}: a conversation does not end with the assistant's turn, so nothing is expected")
        prompts.append(messages[:-1])
        expected.append(messages[-1]["content"].strip())
    return prompts, expected
