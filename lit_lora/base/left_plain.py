"""What of a model quantization leaves in full precision, by its name: the output head, and ``skip_modules``."""

from __future__ import annotations

from lit_lora.config import QuantizationConfig

HEADS = ("lm_head", "embed_out", "output_projection")
"""What transformers' models call their output head."""


def is_left_plain(name: str, quantization: QuantizationConfig) -> bool:
    """Whether a layer or parameter of this name is left alone."""
    return any(is_named_by(entry, name) for entry in (*HEADS, *(quantization.skip_modules or [])))


def is_named_by(entry: str, name: str) -> bool:
    """Whether an entry of ``skip_modules`` is a part of the path ``name``."""
    return f".{entry}." in f".{name}."
