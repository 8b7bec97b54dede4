"""Adapters around ``nn.MultiheadAttention``: one on queries, keys and values, packed as they are, one on the output.

Its forward calls no layer and reads the weights, so that for the time of a forward the adapted weights stand in the
place of the frozen ones, as instance attributes, which Python finds before parameters. Nothing of torch is replaced.

PEFT (0.21) adds the output's product twice in each forward and in each merge, and has the gradient of one: what its
files say is that function, and so it is here, with its whole gradient (twice PEFT's on the output's A and B).

Shapes: E width, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lit_lora.adapters.layers import LoRALinear
from lit_lora.adapters.lora_layer import LoRALayer, WithAttributesOfBase, bare_linear, scaled_product
from lit_lora.base import base_weight
from lit_lora.config import LoRAConfig

_OUTPUT = "base_layer.out_proj"


def is_packed_attention(module: nn.Module) -> bool:
    """Whether this is torch's, or of a class with its forward."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


class LoRAOutput(LoRALinear):
    """The adapter on the output, whose weight is read by the attention."""

    is_portable = False
    not_by_rows = "which takes several inputs"

    @classmethod
    def scale(cls, config: LoRAConfig, r: int, lora_alpha: float) -> float:
        """Twice that of other layers."""
        return 2 * config.scaling(r, lora_alpha)

    @property
    def base_is_plain(self) -> bool:
        """The attention is asked."""
        return True


class LoRAAttention(WithAttributesOfBase, LoRALayer):
    """An adapter around an attention whose queries, keys and values have one packed weight ``(3E, E)``."""

    tensor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    is_portable = False
    not_by_rows = "which takes several inputs"

    def __init__(self, base_layer: nn.Module, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        width, device = self.base_layer.embed_dim, self.base_layer.in_proj_weight.device
        dtype = getattr(torch, config.adapter_dtype)
        self.lora_A = bare_linear(width, r, device=device, dtype=dtype)
        self.lora_B = bare_linear(r, 3 * width, device=device, dtype=dtype)
        self.base_layer.out_proj = LoRAOutput(self.base_layer.out_proj, config, r=r, lora_alpha=lora_alpha)

    @classmethod
    def tensor_shapes(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """A ``(R, E)`` and B ``(3E, R)``, and those of the output, ``(R, E)`` and ``(E, R)``."""
        width = cast(Any, base_layer).embed_dim
        return {
            "lora_A.weight": (r, width),
            "lora_B.weight": (3 * width, r),
            f"{_OUTPUT}.lora_A.weight": (r, width),
            f"{_OUTPUT}.lora_B.weight": (width, r),
        }

    @classmethod
    def refusal(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> str | None:
        """Of widths that differ, and of what PEFT's adapter leaves out."""
        if cast(Any, base_layer).in_proj_weight is None:
            return "its keys or values have a width of their own, for which PEFT has no adapter"
        beside = {
            "lora_dropout": (config.lora_dropout, "its adapter is added to the weight, where no input is dropped"),
            "lora_bias": (config.lora_bias, "PEFT never adds the bias of its queries, keys and values"),
            f"bias {config.bias!r}": (config.bias != "none", "its biases are packed, and of no layer"),
        }
        for what, (is_set, why) in beside.items():
            if is_set:
                return f"{what} does not work with nn.MultiheadAttention: {why}"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What torch's attention returns, computed with the adapted weights."""
        if not self.enabled or self.merged:
            return self.base_layer(*args, **kwargs)
        base, output = self.base_layer, self.output
        base.__dict__["in_proj_weight"] = self._adapted(base.in_proj_weight, self)
        output.base_layer.__dict__["weight"] = self._adapted(output.base_layer.weight, output)
        try:
            return base(*args, **kwargs)
        finally:
            del base.__dict__["in_proj_weight"], output.base_layer.__dict__["weight"]

    @staticmethod
    def _adapted(weight: Tensor, layer: LoRALayer) -> Tensor:
        lora_A, lora_B = layer.factors()
        return (weight + (lora_B @ lora_A) * layer.scaling).to(weight.dtype)

    @property
    def output(self) -> LoRAOutput:
        """The adapter on the output."""
        return self.base_layer.out_proj

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``(R, E)`` and B ``(3E, R)`` of queries, keys and values."""
        return cast(nn.Parameter, self.lora_A.weight), cast(nn.Parameter, self.lora_B.weight)

    def delta_weight(self) -> Tensor:
        """``scaling * B @ A``, ``(3E, E)``."""
        return scaled_product(self.lora_B.weight, self.lora_A.weight, self.scaling)

    @property
    def held(self) -> tuple[nn.Module, str]:
        """The attention, and its packed weight."""
        return self.base_layer, "in_proj_weight"

    @property
    def is_quantized(self) -> bool:
        """Never: only linear layers are."""
        return False

    @property
    def base_is_plain(self) -> bool:
        """No hook waits for it."""
        return not base_weight.is_intercepted(self.base_layer)

    def start(self, fill: Callable[[Tensor], Any]) -> None:
        """Fill both A, and both B with zeros."""
        fill(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        self.output.start(fill)

    def start_at_random(self) -> None:
        """Kaiming-uniform all four."""
        for half in self.factors():
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        self.output.start_at_random()

    def sample_input(self, generator: torch.Generator) -> Tensor:
        """Queries alone, so that one with hooks, whose purpose is unknown, is not merged."""
        return torch.randn(2, self.base_layer.embed_dim, generator=generator, device="cpu")
