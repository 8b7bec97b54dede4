"""``lit-lora harness``: tasks of lm-evaluation-harness, without an adapter and with it."""

from __future__ import annotations

import json
from typing import Any, Literal

from lit_lora.config import QuantizationConfig


def harness(
    tasks: list[str],
    adapter: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    folder: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    output: str | None = None,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a base, and on the same with an adapter.

    Args:
        tasks: names of tasks, or of groups of them, as the harness has them.
        adapter: folder of an adapter in PEFT's format; the base alone is measured if there is none.
        base: base model, as in --model.base; by default the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the adapter names.
        quantization: how to quantize the base, such as --quantization.bits 4; by default as the adapter was trained.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: dtype of the base's weights; by default as the adapter was trained, and auto without an adapter.
        tokenizer: name or folder of another tokenizer than that of the adapter, or of the base without one.
        folder: folder with YAML files of tasks of your own.
        num_fewshot: examples before each question; by default what the task says.
        limit: examples of each task; all if not given.
        batch_size: prompts at a time.
        chat: write each question into the chat template.
        output: file to write the numbers to, as JSON.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    for name, value in {"limit": limit, "batch_size": batch_size}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    from lit_lora.adapters.merge import disable_lora
    from lit_lora.evaluation.harness import find_tasks, run_tasks, table
    from lit_lora.evaluation.load import load
    from lit_lora.files.atomic import atomic_text

    manager = find_tasks(tasks, folder)  # before anything is loaded
    loaded = load(
        adapter, base=base, revision=revision, quantization=quantization, full_precision=full_precision, dtype=dtype,
        tokenizer=tokenizer, other_base=other_base, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if chat and loaded.tokenizer.chat_template is None:
        raise ValueError("--chat writes questions into the chat template, and the tokenizer has none: leave it out")
    options: dict[str, Any] = {"num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size, "chat": chat}
    with disable_lora(loaded.model):
        found = {"base": run_tasks(loaded, tasks, manager, **options)}
    if adapter is not None:
        found["adapter"] = run_tasks(loaded, tasks, manager, **options)
    print(table(found))
    if output is not None:
        atomic_text(output, json.dumps(found, indent=1, default=str))
