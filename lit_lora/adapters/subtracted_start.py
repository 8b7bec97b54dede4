"""An adapter that starts as a part of the weight: PiSSA, OLoRA, CorDA. The base stays as it was.

These methods train ``W - s B0 A0 + s B A``, with ``B0 A0`` a part of ``W`` that A and B start as. PEFT puts the first
two terms in the place of the base. Here the base is what it was, bit for bit, and the start is taken off in the
low-rank product, which then has twice the rank: ``W + s [B, -B0] [A; A0]``. So the base can be quantized or divided,
the adapter can be switched off, and what is written is an adapter of the original base, as PEFT's after conversion.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_lora.adapters.functional import add_lora
from lit_lora.adapters.layers import LoRALinear
from lit_lora.adapters.lora_layer import scaled_product
from lit_lora.adapters.module_names import plain_name
from lit_lora.base import shards
from lit_lora.config import LoRAConfig
from lit_lora.kernels.cuda_way import has_no_values

START = "start"
"""What A0 and B0 are called beside the weights of A and B: buffers, which checkpoints hold."""


class StartedLinear(LoRALinear):
    """An adapter around anything linear, with its start taken off."""

    def __init__(self, base_layer: nn.Module, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        for half in (self.lora_A, self.lora_B):
            half.register_buffer(START, torch.zeros_like(half.weight.detach()))

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """``(..., in)`` to ``(..., out)``; with ``up``, the input is ``silu(x) * up``."""
        if not (self.training and self.config.lora_dropout and self.enabled and not self.merged):
            return super().forward(x, up)
        x = x if up is None else F.silu(x) * up
        start_A, start_B = self.starts()  # a part of the weight: its input is whole, as in PEFT
        base = add_lora(self.base_layer(x), x, start_A, -start_B, self.scaling)
        return add_lora(base, x, *self.factors(), self.scaling, self.config.lora_dropout)

    def computed_factors(self) -> tuple[Tensor, Tensor]:
        """``[A; A0]`` ``(2R, I)`` and ``[B, -B0]`` ``(O, 2R)``."""
        (lora_A, lora_B), (start_A, start_B) = self.factors(), self.starts()
        return torch.cat([lora_A, start_A]), torch.cat([lora_B, -start_B], dim=1)

    def delta_weight(self) -> Tensor:
        """``scaling * (B @ A - B0 @ A0)``, ``(out, in)``."""
        lora_A, lora_B = self.computed_factors()
        return scaled_product(lora_B, lora_A, self.scaling)

    def starts(self) -> tuple[Tensor, Tensor]:
        """A0 and B0."""
        return self.lora_A.get_buffer(START), self.lora_B.get_buffer(START)

    @torch.no_grad()
    def start_as(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Let A and B begin as these, and what they begin as be taken off."""
        for weight, start, value in zip(self.factors(), self.starts(), (lora_A, lora_B), strict=True):
            weight.copy_(value)
            start.copy_(weight)

    def whole_weight(self) -> Tensor:
        """What it is a part of, float32 ``(O, I)``, divided or not."""
        return shards.whole(self.read_base()).float()

    @property
    def is_valueless(self) -> bool:
        """Whether its tensors have no values, so that there is nothing to begin as."""
        weight = self.base_parameter
        return weight.is_meta or has_no_values(weight)


def started_layers(model: nn.Module) -> Iterator[tuple[str, StartedLinear]]:
    """Those of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, StartedLinear):
            yield plain_name(name), module


def start_tensors(model: Any) -> dict[str, Tensor]:
    """A0 and B0 of all layers, by name: with what is trained, all that an adapter consists of."""
    return {
        f"{name}.{half}.{START}": tensor
        for name, layer in started_layers(model)
        for half, tensor in zip(("lora_A", "lora_B"), layer.starts(), strict=True)
    }


def with_starts(
    model: nn.Module, config: LoRAConfig, state: Mapping[str, Tensor]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Configuration and tensors of a plain adapter that computes the same, of twice the rank.

    Args:
        model: with adapters.
        config: as they are to be written.
        state: of the adapter.
    """
    started = dict(started_layers(model))
    if not started:
        return config, dict(state)
    state = {name: tensor for name, tensor in state.items() if not name.endswith(f".{START}")}
    for name, layer in started.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = (
            factor.detach() for factor in layer.computed_factors()
        )
    wider = math.sqrt(2) if config.use_rslora else 2  # the scale stays
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=wider * config.lora_alpha,
        rank_pattern={name: 2 * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: wider * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    ), state
