"""Whole runs through the command line, in this process, on a tiny base with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lit_lora.__main__ import main
from lit_lora.metrics import TrainingMetrics
from tests.chat_tokenizers import VOCAB_SIZE, chat_tokenizer
from tests.tiny import config

ANSWERS = {"say one": "yes", "say two": "no way", "say three": "maybe so", "say four": "ok"}
"""What a model learns by heart in a few dozen steps."""


def make_base(folder: Path, template: str | None = None, **fields: Any) -> str:
    """A folder with random weights and a tokenizer that ends with ``<|endoftext|>``."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
    AutoModelForCausalLM.from_config(config("Llama", **{**sizes, **ids, **fields})).save_pretrained(folder)
    chat_tokenizer(template).save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(path: Path) -> str:
    return write_rows(path, [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()])


def lit_lora(*arguments: object, **options: object) -> None:
    """``options`` name settings, ``__`` for a dot."""
    given = [part for name, value in options.items() for part in (f"--{name.replace('__', '.')}", str(value))]
    main([*map(str, arguments), *given])


def fit(base: str, data: str, run: Path, *, max_steps: int, **options: object) -> Path:
    """Train, with the training data as validation data; returns the folder of the adapter."""
    defaults: dict[str, object] = {
        "model__base": base, "data__train": data, "data__validation": data, "data__cache_dir": run.parent / "cache",
        "model__lora__r": 16, "model__optimization__learning_rate": 0.02,
        "trainer__max_steps": max_steps, "trainer__max_epochs": -1,
        "trainer__check_val_every_n_epoch": 1000, "trainer__accelerator": "cpu", "trainer__default_root_dir": run,
        "trainer__enable_progress_bar": "false", "convergence__min_decrease": 0.0,
    }  # fmt: skip
    lit_lora("fit", **{**defaults, **options})
    return run / "adapter"


def validation_loss(run: Path) -> float:
    return TrainingMetrics.load(run / "metrics.jsonl").validation[-1]["val_loss"]
