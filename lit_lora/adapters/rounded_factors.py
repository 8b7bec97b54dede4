"""A and B rounded to half precision once, for answers of many tokens, where each layer would round them every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lit_lora.adapters.functional import half_precision
from lit_lora.adapters.half_precision import RoundedFactors
from lit_lora.adapters.layers import LoRALinear
from lit_lora.base.shards import is_sharded


@contextmanager
def rounded_factors(model: nn.Module) -> Iterator[None]:
    """Within, adapted layers use their factors as they were at its beginning, wherever nothing is differentiated.

    Args:
        model: in evaluation mode. Layers in full precision, quantized ones, those of a base that is divided, and
            adapters that do more than multiply twice, compute as ever.
    """
    adapted = [each for each in model.modules() if isinstance(each, LoRALinear)]
    layers = [] if is_sharded(model) else [each for each in adapted if _can_be_rounded(each)]
    for layer in layers:
        layer.rounded = RoundedFactors.of(*layer.computed_factors(), layer.scaling, layer.base_layer.weight.dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.rounded = None


def _can_be_rounded(layer: LoRALinear) -> bool:
    if not layer.can_be_fused() or layer.is_transposed or layer.may_be_quantized or layer.added_bias is not None:
        return False
    weight = layer.base_layer.weight
    return half_precision(weight, weight) == weight.dtype  # under autocast to another type it is that
