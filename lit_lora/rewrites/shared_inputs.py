"""Adapted layers that read the same tensor, found in one forward pass and then computed together in half precision.

Which layers these are is seen, not looked up: the model runs on a few tokens, and layers that are called one right
after the other with one and the same tensor belong together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_lora.adapters.layers import LoRALinear
from lit_lora.adapters.merge import disable_lora
from lit_lora.adapters.shared_input import SharedInput
from lit_lora.base.shards import device_of_model, in_one_pass
from lit_lora.base.whose_error import ask, raised_here

_TOKENS = 4


def share_inputs(model: nn.Module) -> int:
    """Let adapted layers with the same input be computed by the first of them.

    Args:
        model: with adapters. One that is no language model of transformers, or that needs other inputs than token ids,
            is left alone.

    Returns:
        How many groups of layers were found.
    """
    groups: list[list[LoRALinear]] = []
    last: Tensor | None = None

    def called(layer: LoRALinear, args: tuple[Any, ...]) -> None:
        nonlocal last
        x = args[0] if len(args) == 1 else None  # one that makes its input from two has none in common
        if x is not None and x is last and type(groups[-1][0].base_layer) is type(layer.base_layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = x

    handles = [m.register_forward_pre_hook(called) for m in model.modules() if isinstance(m, LoRALinear)]
    try:
        _run(model)
    finally:
        for handle in handles:
            handle.remove()
    found = [group for group in groups if len(group) > 1]
    seen = [id(layer) for group in groups for layer in group]
    found = [group for group in found if all(seen.count(id(layer)) == 1 for layer in group)]
    for group in found:
        shared = SharedInput(group)
        for layer in group:
            layer.shared_input = shared
    return len(found)


@torch.no_grad()
def _run(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        return
    ids = torch.zeros((1, _TOKENS), dtype=torch.int64, device=device_of_model(model))

    def forward() -> None:
        in_one_pass(model, lambda: ask(model.get_decoder(), input_ids=ids, use_cache=False))

    try:
        forward()
    except Exception as error:
        # A model that needs other inputs may hand an adapted layer what no layer takes: then its own take it no better.
        if raised_here(error) and _succeeds_without_adapters(model, forward):
            raise


def _succeeds_without_adapters(model: nn.Module, forward: Callable[[], None]) -> bool:
    try:
        with disable_lora(model):
            forward()
    except Exception:
        return False
    return True
