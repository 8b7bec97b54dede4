"""``lit-lora evaluate``: scores on held-out examples, before and after fine-tuning."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lit_lora.config import QuantizationConfig

if TYPE_CHECKING:
    from lit_lora.evaluation.held_out import HeldOut
    from lit_lora.evaluation.score import Scores


def evaluate(
    data: str,
    adapter: list[str],
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
    metrics: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    show: int = 3,
    min_gain: float = 0.0,
    on_bad_rows: Literal["error", "drop"] = "error",
    output: str | None = None,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Measure a model on held-out examples, without its adapter and with it, or with each of several.

    The expected answer is each conversation's last assistant turn; surrounding white space does not count. The loss is
    the mean over target tokens, those of all assistant turns, as in validation. Plain text asks for no answers. Each
    score has a 95 % confidence interval, and says whether it can be told apart from that of the base.

    Args:
        data: file of held-out examples, in any format that training reads.
        adapter: folder of an adapter in PEFT's format; several are shown side by side.
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
        metrics: of exact_match, token_accuracy, perplexity, rouge, bleu and json, with commas; by default the first
            three, and json where every expected answer is a JSON object.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts at a time; by default 25, for answers on a CPU what 16,384 tokens hold.
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

    names = None if metrics is None else [name.strip() for name in metrics.split(",") if name.strip()]

    from lit_lora.cli.progress import Counting
    from lit_lora.evaluation.answer_metrics import check_metrics
    from lit_lora.evaluation.held_out import read_held_out
    from lit_lora.evaluation.load import load_in_turn
    from lit_lora.evaluation.score import Measured, score
    from lit_lora.interchange.adapter_folder import folder_record, local_folder
    from lit_lora.interchange.adapter_naming import check_given_once
    from lit_lora.runs.said import readable

    check_given_once(adapter)
    folders = [local_folder(one) for one in adapter]
    records = [folder_record(folder) for folder in folders]
    held_outs = [  # before anything is loaded
        read_held_out(
            data,
            record,
            format=format,
            columns=columns,
            max_length=max_length,
            train_on_prompt=train_on_prompt,
            limit=limit,
            on_bad_rows=on_bad_rows,
        )
        for record in records
    ]
    held_out = held_outs[0]
    _check_asked_alike(adapter, held_outs)
    if names is not None:
        check_metrics(names, has_answers=bool(held_out.prompts))
    if not held_out.prompts and min_gain:
        raise ValueError(f"--min_gain is about exact match, and {data} holds plain text, which asks for no answers")
    if names is not None and "exact_match" not in names and min_gain:
        raise ValueError(f"--min_gain is about exact match: add exact_match to --metrics {metrics}")
    if held_out.prompts and records[0].format == "text":
        print("the adapter was trained on plain text, and is asked in the chat template", file=sys.stderr)
    found: dict[str, Scores] = {}
    base_scores: Measured | None = None
    with readable():
        take = load_in_turn(
            dict(zip(adapter, folders, strict=True)),
            base=base,
            revision=revision,
            quantization=quantization,
            full_precision=full_precision,
            dtype=dtype,
            tokenizer=tokenizer,
            other_base=other_base,
            trust_remote_code=trust_remote_code,
        )
    for name in adapter:
        with Counting() as progress:
            found[name] = score(
                take(name),
                held_out,
                metrics=names,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=progress,
                base=base_scores,
                name="the adapter" if len(adapter) == 1 else name,
            )
        base_scores = found[name].base
    _show(held_out, found, show)
    print(f"\n{_said(found)}")
    if output is not None:
        _write(output, found)
    for name, scores in found.items():
        if scores.before and scores.after and scores.after.exact_match - scores.before.exact_match < min_gain:
            which = "the adapter" if len(found) == 1 else name
            raise RuntimeError(
                f"exact match rose by less than {min_gain} percentage points: {which} did not learn the task"
            )


def _check_asked_alike(adapters: Sequence[str], held_outs: Sequence[HeldOut]) -> None:
    """Check that all adapters look at the data in one way.

    Raises:
        ValueError: naming what differs, and how to make it the same.
    """
    for name, held_out in zip(adapters[1:], held_outs[1:], strict=True):
        first, second = (h._replace(examples=None) for h in (held_outs[0], held_out))  # type: ignore[arg-type]
        if first != second:
            fields = [n for n, a, b in zip(first._fields, first, second, strict=True) if a != b]
            raise ValueError(
                f"{adapters[0]} and {name} would look at the data in different ways ({', '.join(fields)}): set "
                "--format, --columns, --max_length or --train_on_prompt for both, or evaluate them one at a time"
            )


def _said(found: dict[str, Scores]) -> str:
    """What was found; of several adapters side by side, and of each against the first."""
    from lit_lora.evaluation.score import compared, table

    scores = list(found.values())
    if len(scores) == 1:
        return str(scores[0])
    models = {"base": scores[0].base, **{name: one.adapted for name, one in found.items()}}
    lines = [*table(models, *(one.comparisons for one in scores)), ""]
    (first, best), *others = found.items()
    for name, one in others:
        for metric, comparison in list(compared(best.adapted.scored, one.adapted.scored).items())[:1]:
            lines.append(f"{name}, {metric}: {comparison.said(first)}")
    cut = [f"{one.after.num_cut} of {name}" for name, one in found.items() if one.after and one.after.num_cut]
    if cut:
        most = scores[0].max_new_tokens
        lines.append(f"answers cut at max_new_tokens={most}, of {scores[0].num_examples} each: {', '.join(cut)}")
    losses = ", ".join(f"{name} {measured.loss:.3f}" for name, measured in models.items())
    return "\n".join([*lines, f"mean loss per target token on {scores[0].num_examples} held-out examples: {losses}"])


def _write(output: str, found: dict[str, Scores]) -> None:
    """Scores and answers as JSON: of one adapter as such, of several by their names."""
    from lit_lora.files.atomic import atomic_text

    scores = [one.to_dict() for one in found.values()]
    content: dict[str, Any] = scores[0] if len(scores) == 1 else {"adapters": dict(zip(found, scores, strict=True))}
    atomic_text(output, json.dumps(content, ensure_ascii=False, indent=1))


def _show(held_out: HeldOut, found: dict[str, Scores], count: int) -> None:
    scores = next(iter(found.values()))
    if scores.before is None:
        return
    after = {"after" if len(found) == 1 else name: one.after for name, one in found.items()}
    width = max(10, *(len(name) + 2 for name in after))
    for index, messages in enumerate(held_out.prompts[:count]):
        shown = {
            "request": messages[-1]["content"],
            "expected": scores.expected[index],
            "before": scores.before.texts[index],
            **{name: answers.texts[index] for name, answers in after.items() if answers is not None},
        }
        print("", *(f"{name:<{width}}{' '.join(text.split())[:160]}" for name, text in shown.items()), sep="\n")
