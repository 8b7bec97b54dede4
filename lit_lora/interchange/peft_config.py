"""``adapter_config.json``: PEFT's description of an adapter, to and from ``LoRAConfig``.

PEFT drops keys that it does not know with a warning. Here a key that changes the function and is not implemented
raises: an adapter is either the one that was trained, or an error.
"""

from __future__ import annotations

import reprlib
from dataclasses import fields
from typing import Any

from lit_lora.config import LoRAConfig

_READ = {field.name for field in fields(LoRAConfig)} - {"adapter_dtype", "eva_rho", "freeze_A", "init_lora_weights"}
"""Keys whose values are fields of ``LoRAConfig``, which checks them."""

_HARMLESS = {
    "alora_invocation_string",  # a note beside alora_invocation_tokens
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # of ways to start, like the next three: left over where it started otherwise
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "fan_in_fan_out",  # follows from the type of the layer
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Keys that change nothing about the function, whatever their value."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = 100

_SAME_BASE_STARTS = ("eva", "mica", "orthogonal")
"""Ways to start that leave the base as it was, so that the tensors in the file say everything."""


def to_peft_config(
    config: LoRAConfig,
    base_model_name: str | None,
    *,
    revision: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Args:
        config: what was injected.
        base_model_name: Hub id or folder of the base model.
        revision: branch, tag or commit of the base on the Hub.
        task_type: PEFT's name for the task, such as "CAUSAL_LM".
        fan_in_fan_out: whether the adapted layers store their weights transposed (GPT-2's ``Conv1D``).
    """
    return {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": config.bias,
        "ensure_weight_tying": config.ensure_weight_tying,
        "exclude_modules": config.exclude_modules,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": config.layers_pattern,
        "layers_to_transform": config.layers_to_transform,
        "lora_alpha": config.lora_alpha,
        "lora_bias": config.lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": config.modules_to_save,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": revision,
        "target_modules": config.target_modules,
        "target_parameters": config.target_parameters,
        "task_type": task_type,
        "trainable_token_indices": config.trainable_token_indices,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }


def from_peft_config(content: Any) -> LoRAConfig:
    """Read the content of an ``adapter_config.json``, written by any version of PEFT.

    Raises:
        ValueError: if it is not a LoRA adapter, a value has the wrong type, or it uses something that changes the
            function and that lit_lora does not implement.
    """
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    if content.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {content.get('peft_type')!r}")
    known: dict[str, Any] = {name: content[name] for name in _READ if content.get(name) not in (None, "", [])}
    known["init_lora_weights"] = _start(content.get("init_lora_weights", True))
    harmless = _HARMLESS | _READ | {"init_lora_weights"}
    refused = {
        name: value
        for name, value in content.items()
        if name not in harmless and value not in (None, False, "", [], {}) and (name, value) != ("bias", "none")
    }
    if refused:
        names = [f"{name:.100}={_SHORT.repr(value)}" for name, value in sorted(refused.items())]
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise ValueError(f"uses what lit_lora does not implement, or does not know: {', '.join(names[:20])}{more}")
    if not known.get("target_modules"):
        if not any(known.get(name) for name in ("modules_to_save", "target_parameters", "trainable_token_indices")):
            raise ValueError("target_modules is missing or empty: name the adapted layers")
        known["target_modules"] = []
    known.setdefault("lora_alpha", 8)  # PEFT's default, ours differs
    return LoRAConfig(**known)


def _start(start: Any) -> Any:
    """Since the tensors are read from a file, how they started only matters if the base was changed along."""
    if start is None or isinstance(start, bool) or start in _SAME_BASE_STARTS:
        return True if start is None or isinstance(start, str) else start
    if start == "gaussian":
        return start
    raise ValueError(
        f"init_lora_weights={start!r} changes the base model when training starts, so these tensors do not belong to "
        "the base as published. Convert the adapter with PEFT: save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...)"
    )
