"""Strategies that split the model over processes, which are refused, with the reason."""

from __future__ import annotations

import re


def refuse_sharding(strategy: str) -> None:
    """Check that every process will hold the whole model.

    Args:
        strategy: name or class of a Lightning strategy.

    Raises:
        ValueError: if it splits the model.
    """
    if re.search(r"fsdp|model_?parallel|deepspeed", strategy.lower()):
        raise ValueError(
            f"trainer.strategy {strategy!r} splits the model over processes, which lit_lora does not support: "
            "checkpoints of adapters only, gradients normalised by tokens, and quantized layers need whole parameters. "
            "Use 'ddp': each process holds the base (quantize it if it is too large) and they share the work"
        )
