"""Recompute decoder layers in the backward pass instead of keeping their activations.

All layers, or only as many as memory needs: each recomputed layer costs its forward pass a second time, so half of
them cost half. The first layers are taken: their activations are held longest. Non-reentrant, since the input of a
frozen embedding needs no gradient and the reentrant kind would then train nothing. What is recomputed attends as it did
the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from lit_lora.base.attention_choice import selection_for_recompute
from lit_lora.base.repeated_layers import repeated_layers


def checkpoint_layers(model: nn.Module, num_layers: int | None = None) -> int:
    """Let the first ``num_layers`` layers of ``model`` be recomputed in the backward pass.

    Args:
        model: any model with a list of equal layers.
        num_layers: how many; all if None.

    Returns:
        How many layers are recomputed.

    Raises:
        ValueError: if the model has no list of layers, or not that many.
    """
    layers = repeated_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no list of equal layers to recompute: set recompute to false")
    if num_layers is not None and not 0 <= num_layers <= len(layers):
        raise ValueError(f"cannot recompute {num_layers} of {len(layers)} layers")
    chosen = layers[:num_layers]
    for layer in chosen:
        layer.forward = partial(_recomputed, layer.forward)
    return len(chosen)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A layer's forward pass, recomputed in the backward pass if there will be one.

    Without a key-value cache, as in transformers: the second pass would fill it again, and training has no use for it.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    args = tuple(None if isinstance(value, Cache) else value for value in args)
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    # A CUDA graph repeats no state of random numbers: where some are drawn, none is recorded (cuda_graphs.py).
    recorded = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        preserve_rng_state=not recorded,
        context_fn=selection_for_recompute,
        **kwargs,
    )
