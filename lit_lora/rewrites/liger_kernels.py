"""Liger's Triton kernels for norms, rotary positions and gated MLPs, on a model that is loaded (CUDA only).

Through liger-kernel's own table of models: an optional package, ``pip install 'lit_lora[liger]'``. The loss stays ours.
Its MLPs call ``gate_proj``, ``up_proj`` and ``down_proj`` as modules, so adapters go around them as before. Rotary
positions (and for some models the classes of norms and MLPs) are replaced in transformers' module for the whole
process, models loaded later included: there is no narrower way in liger-kernel 0.8.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import torch
from torch import nn
from transformers import PreTrainedModel

_NEVER = ("cross_entropy", "fused_linear_cross_entropy")


def check_available(device: torch.device) -> None:
    """Look for what the kernels need, before anything large is loaded.

    Raises:
        ValueError: if ``device`` is no CUDA device, or liger-kernel is not installed.
    """
    if device.type != "cuda":
        raise ValueError(f"liger needs a CUDA device, this run is on {device.type}: set liger to false")
    if find_spec("liger_kernel") is None:
        raise ValueError("liger needs the package liger-kernel: pip install 'lit_lora[liger]', or set liger to false")


def apply(model: nn.Module) -> list[str]:
    """Replace what liger has kernels for; before adapters are injected.

    Returns:
        What was replaced, such as rms_norm, rope, swiglu.

    Raises:
        ValueError: if liger has nothing for this type of model.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ValueError(f"liger has no kernels for model type {model_type!r}; it has some for {known}")
    _apply_liger_kernel_to_instance(model=model, **dict.fromkeys(_NEVER, False))
    parameters = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]).parameters
    return sorted(name for name, parameter in parameters.items() if parameter.default is True and name not in _NEVER)
