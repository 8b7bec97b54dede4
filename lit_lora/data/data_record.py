"""What an adapter's record says about the data it was trained on: which tokenizer, which template, how it was read.

The digests agree wherever the tokenizer was loaded from, and by whichever version of a library.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.chat_template import chat_template, run_tokenizer
from lit_lora.data.chats.turn_end import text_end, turn_end
from lit_lora.data.prepared.prepare import SourceSettings

_PROBE = "The  quick\tbrown fox, 12345.67 don't\n\n  Ünïcödé 東京 😀 naïve ﬁ <a> [b] {c}; x=y+z\n"
"""Text that normalizers, pre-tokenizers and merges treat in their own ways."""


def data_record(
    tokenizer: PreTrainedTokenizerBase, settings: SourceSettings, *, name: str | None, format: str
) -> dict[str, Any]:
    """Fields of ``adapters.trained_on.TrainedOn``.

    Args:
        tokenizer: what the data was tokenized with.
        settings: how it was read.
        name: where the tokenizer came from; None for what it says itself.
        format: of the data, as it was found.
    """
    end = text_end(tokenizer) if format == "text" else turn_end(tokenizer)
    return {
        "tokenizer": name or tokenizer.name_or_path or None,
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "format": format,
        "columns": dict(settings.columns) if settings.columns else None,
        "max_length": settings.max_length,
        "train_on_prompt": settings.train_on_prompt,
        "train_on_turns": None if settings.train_on_turns == "all" else settings.train_on_turns,
        "reasoning": None if settings.reasoning == "keep" else settings.reasoning,
        "turn_end_ids": end.ids,
        "turn_end_strings": end.strings,
    }


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of how text becomes ids: the vocabulary, the tokens with a role, and what becomes of a text."""
    return _digest(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "text": list(run_tokenizer(tokenizer, _PROBE)["input_ids"]),
        }
    )


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the template that conversations are written in, the built-in one where the tokenizer has none."""
    return _digest(chat_template(tokenizer) or tokenizer.chat_template)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
