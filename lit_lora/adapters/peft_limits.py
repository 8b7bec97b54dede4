"""Layers that can be adapted here, but whose adapter PEFT would not load, or would put somewhere else.

What is trained has to be of use elsewhere, so that training refuses them. Reading an adapter does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from lit_lora.adapters.task_heads import as_pretrained

_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""PEFT refuses ``out_proj`` and ``conv1d`` of these, whose weights fused kernels read (``tuners_utils``, 0.21)."""

_TAKEN_FOR_EXPERTS = {
    "mixtral": {"gate", "w1", "w2", "w3"},
    "qwen2_moe": {"gate", "gate_proj", "up_proj", "down_proj"},
}
"""What transformers calls an architecture's layout of experts -> ends of names.

Before transformers 5 experts were linear layers with these names. PEFT (0.21) takes every target that ends so for the
fused experts, even the full name of a shared expert or of a dense layer
(``transformers_weight_conversion._convert_peft_config_moe``).
"""


def refused_by_peft(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Layers among ``names`` for which PEFT loads no adapter -> why."""
    pretrained = as_pretrained(model)
    kind = getattr(pretrained.config, "model_type", None) if pretrained is not None else None
    if kind is None:
        return {}
    refused: dict[str, str] = {}
    layouts = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    taken = _TAKEN_FOR_EXPERTS.get({"mixtral": "mixtral", **layouts}.get(kind, ""), set())
    for name in names:
        end = name.rpartition(".")[2]
        if kind in _MAMBA and end in ("out_proj", "conv1d"):
            refused[name] = f"PEFT loads no adapter for it in {kind} models, whose fused kernels read its weight"
        elif end in taken:
            refused[name] = f"PEFT takes its name for that of the fused experts of {kind} models"
    return refused
