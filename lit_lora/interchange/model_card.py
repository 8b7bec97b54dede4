"""The ``README.md`` of an adapter: what it is, what it was trained on, and what came out.

Its front matter is what the Hub reads (base model, library, licence left to the author).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import LoRAConfig


def model_card(
    config: LoRAConfig,
    *,
    base_model_name: str | None,
    data: str | None,
    hyperparameters: Mapping[str, Any],
    results: Mapping[str, Any],
    record: TrainedOn = TrainedOn(),  # noqa: B008 (frozen)
) -> str:
    """Write the model card.

    Args:
        config: the adapter's configuration.
        base_model_name: Hub id or folder of the base model; only a Hub id is named in the front matter.
        data: what the adapter was trained on.
        hyperparameters: settings of the run, by name.
        results: measurements, by name.
        record: what it was trained with, as far as that is known.

    Returns:
        Markdown with YAML front matter.
    """
    base = base_model_name or "path/to/the/base/model"
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- lora", "- lit-lora"]
    if is_hub_id(base):
        front.insert(0, f"base_model: {base}")
    adapter: dict[str, Any] = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "target modules": config.target_modules,
    }
    adapter |= {"scale": "alpha / sqrt(rank)"} if config.use_rslora else {}
    adapter |= {"trained in full": config.modules_to_save} if config.modules_to_save else {}
    adapter |= {"ranks": config.rank_pattern} if config.rank_pattern else {}
    adapter |= {"alphas": config.alpha_pattern} if config.alpha_pattern else {}
    parts = ["---", *front, "---", "", f"# LoRA adapter for {_text(base)}", "", *_table("Adapter", adapter)]
    if data:
        parts += ["## Data", "", data, ""]
    parts += _table("Training", hyperparameters)
    parts += _table("Results", results)
    parts += ["## Use", "", "```python", *_use(base, record), "```", ""]
    return "\n".join(parts)


def _use(base: str, record: TrainedOn) -> list[str]:
    end = record.turn_end_ids
    revision = f", revision={json.dumps(record.revision)}" if record.revision else ""
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if end else ''}",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{revision})",
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]
    if not end:
        return lines
    if record.format == "text":
        prompt = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    else:
        prompt = (
            'messages = [{"role": "user", "content": "Hello"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    return [
        *lines,
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        *prompt.splitlines(),
        f"model.generate(**inputs, max_new_tokens=256, eos_token_id={end})  # as answers ended in training",
    ]


def is_hub_id(name: str) -> bool:
    """Whether this can be a repository on the Hub (``owner/name``), rather than a folder."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    if not rows:
        return []
    body = [f"| {_text(name)} | {_text(value)} |" for name, value in rows.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *body, ""]


def _text(value: Any) -> str:
    """One cell: floats readable, nothing that breaks the table or the markup."""
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, (list, tuple)):
        text = ", ".join(map(str, value))
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key}: {item}" for key, item in value.items())
    else:
        text = str(value)
    return re.sub(r"\s*\n\s*", " ", text).replace("|", "\\|").replace("<", "&lt;")
