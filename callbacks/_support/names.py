"""Reading parameter names: which half of an adapter, which layer.

Names are PEFT's: ``...layers.3.self_attn.q_proj.lora_A.weight``, ``...embed_tokens.lora_embedding_B``; PEFT itself adds
the adapter's name (``lora_A.default.weight``). Names without such a part belong to no half.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

_HALF = re.compile(r"(?:^|\.)lora_(?:embedding_)?([AB])(?:\.|$)")
_NUMBERED = re.compile(r"(?:^|\.)(\w+)\.(\d+)(?=\.)")
_MAX_NAMES = 6


def adapter_half(name: str) -> Literal["A", "B"] | None:
    """Which of the two low-rank matrices the parameter is; None if it is neither."""
    match = _HALF.search(name)
    if match is None:
        return None
    return "A" if match[1] == "A" else "B"


def module_path(name: str) -> str:
    """Path of the module that the parameter adapts or belongs to."""
    match = _HALF.search(name)
    path = name[: match.start()] if match else name.rpartition(".")[0]
    return path or name


def layer_group(name: str) -> str:
    """Name of the numbered layer the parameter lies in (``layers.3``), else the path of its module."""
    match = _NUMBERED.search(name)
    return f"{match[1]}.{match[2]}" if match else module_path(name)


def listed(names: Sequence[str]) -> str:
    """The names for a message: the first few, and how many more there are."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
