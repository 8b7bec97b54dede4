"""How the base of an adapter was quantized in training: noted on the model, and kept in the adapter's weights file.

An adapter belongs to the weights that it was trained beside, and those of a quantized base are others. The note goes
from the loader of the base to the writer of the adapter, and lies in the file's metadata, where PEFT, transformers and
vLLM pass over it. Adapters of other writers, and on models that were loaded otherwise, have none.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from lit_lora.config import QuantizationConfig

NOTE = "lit_lora_quantization"
"""Key in the metadata of a weights file, and attribute of a model: a JSON object, or null for full precision."""


def note_quantization(model: nn.Module, quantization: QuantizationConfig | None) -> None:
    """Note on a base model how it was quantized, None for full precision."""
    text = json.dumps(asdict(quantization) if quantization is not None else None, sort_keys=True)
    setattr(model, NOTE, text)


def forget_note(model: nn.Module) -> None:
    """Take the note away: nothing is known."""
    vars(model).pop(NOTE, None)


def noted_metadata(model: nn.Module) -> dict[str, str]:
    """The note as metadata of a weights file; empty where there is none."""
    return {NOTE: vars(model)[NOTE]} if NOTE in vars(model) else {}


def recorded_quantization(weights: str | Path) -> tuple[bool, QuantizationConfig | None]:
    """Whether an adapter's weights file says how its base was quantized, and how.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(weights, "pt") as file:
            text = (file.metadata() or {}).get(NOTE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}. Take an undamaged copy") from error
    if text is None:
        return False, None
    try:
        return True, quantization_from(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{weights} is damaged, {NOTE} in its metadata: {error}") from error


def quantization_from(content: Any) -> QuantizationConfig | None:
    """The config with these fields, as JSON or YAML has them; None for null.

    Raises:
        ValueError: if it is neither, or a field is unknown or has a value that it cannot have.
    """
    if content is None:
        return None
    known = [field.name for field in fields(QuantizationConfig)]
    if not isinstance(content, dict):
        raise ValueError(f"quantization is {content!r}, expected null or a mapping of {', '.join(known)}")
    if unknown := [name for name in content if name not in known]:
        raise ValueError(f"quantization has the unknown field {unknown[0]!r}, expected some of {', '.join(known)}")
    try:
        return QuantizationConfig(**content)
    except TypeError as error:  # a comparison of what cannot be compared
        raise ValueError(f"quantization has a value of the wrong type: {error}") from error
