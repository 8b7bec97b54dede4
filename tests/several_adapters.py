"""Adapters of several kinds around one tiny base, with random values in all that they may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_lora import LoRAConfig, inject_lora, load_base_model, save_adapter
from lit_lora.base.trained_on import note
from tests.chat_tokenizers import KINDS, chat_tokenizer
from tests.started_runs import make_base, write_rows

LAYERS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LAYERS},
    "other": {"target_modules": ["v_proj", "down_proj"], "r": 4, "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "rows": {"target_modules": LAYERS, "trainable_token_indices": {"embed_tokens": [97, 101]}},
    "copy": {"target_modules": ["o_proj", "down_proj"], "modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
}
PROMPTS = [
    "say one",
    "tell me something longer than that",
    "why",
    "what is it?",
    "again, please",
    "and now?",
    "so",
    "?",
]


def make_adapter(folder: Path, base: Path, settings: dict[str, Any], *, seed: int, **options: Any) -> Path:
    """An adapter with random values in all that it may change, in the run folder of its name."""
    record = {"format": options.pop("format", "messages")}
    tokenizer = options.pop("tokenizer", None) or chat_tokenizer()
    model = load_base_model(str(base), **options)
    torch.manual_seed(seed)
    inject_lora(model, LoRAConfig(**{"r": 8, "lora_alpha": 16, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    note(model, **record)
    return save_adapter(model, folder / "adapter", tokenizer=tokenizer)


def make_place(folder: Path) -> Path:
    """A base, run folders around it, and data; one adapter has another template, one was trained on text."""
    make_base(folder / "base", attention_bias=True)
    chat_tokenizer().save_pretrained(folder / "base")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        make_adapter(folder / name, folder / "base", settings, seed=seed)
    own = chat_tokenizer(KINDS["text"].template)
    make_adapter(folder / "template", folder / "base", ADAPTERS["linear"], seed=20, tokenizer=own)
    make_adapter(folder / "text", folder / "base", ADAPTERS["linear"], seed=21, format="text")
    write_rows(folder / "data.jsonl", [{"prompt": p, "completion": "it is " + "x" * i} for i, p in enumerate(PROMPTS)])
    return folder


def folder_of(place: Path, name: str) -> str:
    return str(place / name / "adapter")
