"""``adapter_config.json``: PEFT's description of an adapter, to and from ``LoRAConfig``.

PEFT drops keys that it does not know with a warning. Here a key that changes the function and is not implemented
raises: an adapter is either the one that was trained, or an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lit_lora.config import LoRAConfig

_HARMLESS = {
    "alora_invocation_string",  # a note beside alora_invocation_tokens
    "auto_mapping",
    "base_model_name_or_path",
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

_SAME_BASE_STARTS = ("eva", "orthogonal")
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
        "bias": "none",
        "exclude_modules": config.exclude_modules,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": config.layers_pattern,
        "layers_to_transform": config.layers_to_transform,
        "lora_alpha": config.lora_alpha,
        "lora_bias": False,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": config.modules_to_save,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": revision,
        "target_modules": config.target_modules,
        "target_parameters": None,
        "task_type": task_type,
        "trainable_token_indices": None,
        "use_dora": False,
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
    given = {name: content[name] for name in _FIELDS if content.get(name) not in (None, "", [])}
    fields = {name: _typed(name, value, *_FIELDS[name]) for name, value in given.items()}
    fields["init_lora_weights"] = _start(content.get("init_lora_weights", True))
    start = content.get("init_lora_weights")
    harmless = _HARMLESS | _FIELDS.keys() | {"init_lora_weights", *([f"{start}_config"] if start == "eva" else [])}
    refused = {
        name: value
        for name, value in content.items()
        if name not in harmless and value not in (None, False, "", [], {}) and (name, value) != ("bias", "none")
    }
    if refused:
        shown = ", ".join(f"{name}={value!r}" for name, value in sorted(refused.items()))
        raise ValueError(f"uses what lit_lora does not implement, or does not know: {shown}")
    if not fields.get("target_modules"):
        if not fields.get("modules_to_save"):
            raise ValueError("target_modules is missing or empty: name the adapted layers")
        fields["target_modules"] = []
    fields.setdefault("lora_alpha", 8)  # PEFT's default, ours differs
    return LoRAConfig(**fields)


def _start(start: Any) -> bool | str:
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


def _typed(name: str, value: Any, expected: str, accepts: Callable[[Any], bool]) -> Any:
    if not accepts(value):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _is_text_or_names(value: Any) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_pattern(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(accepts(item) for item in value.values())


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("an integer", _is_int),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number", _is_number),
    "target_modules": ("names or one expression", _is_text_or_names),
    "exclude_modules": ("names or one expression", _is_text_or_names),
    "modules_to_save": ("a list of names", _is_names),
    "layers_to_transform": (
        "an integer or a list of them",
        lambda value: _is_int(value) or (isinstance(value, list) and all(map(_is_int, value))),
    ),
    "layers_pattern": ("names", _is_text_or_names),
    "rank_pattern": ("a mapping to integers", _is_pattern(_is_int)),
    "alpha_pattern": ("a mapping to numbers", _is_pattern(_is_number)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
}
"""Fields that are read, with what they have to be."""
