"""In what dtype a base is held, whatever of it is quantized."""

from __future__ import annotations

import torch
from torch import nn

from lit_lora.base.base_weight import SCALES
from lit_lora.base.int8_rows import Int8Rows


def held_dtype(model: nn.Module) -> torch.dtype | None:
    """That of the first frozen values, or of what an 8-bit embedding gives; scales of quantized weights say nothing.

    Returns:
        None for a model without such values.
    """
    for module in model.modules():
        if isinstance(module, Int8Rows):
            return module.dtype
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not parameter.requires_grad and name != SCALES:
                return parameter.dtype
    return None
