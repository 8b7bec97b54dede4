"""Adapters around convolutions: A convolves as the base does, down to the rank, and B is a product at each place.

As PEFT has them, so that its files are read and ours are of use there. Its A knows neither the groups nor the dilation
of the base, nor how that fills its edges: where this makes another function than one of the base's weight, the adapter
cannot be merged, and where the sizes would not fit, there is none.

Shapes: I inputs, O outputs, R rank, K... kernel, N batch, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

from lit_lora.adapters.dora import MAGNITUDE
from lit_lora.adapters.lora_layer import LoRALayer, scaled_product
from lit_lora.base import base_weight
from lit_lora.config import LoRAConfig

_FUNCTIONS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


def is_convolution(module: nn.Module) -> bool:
    """Whether this is one of torch's own, or of a class that computes as these do."""
    kind = next((kind for kind in _FUNCTIONS if isinstance(module, kind)), None)
    if kind is None or isinstance(module, LazyModuleMixin):
        return False
    return type(module).forward is kind.forward


class LoRAConv(LoRALayer):
    """An adapter around a convolution in one, two or three dimensions."""

    tensor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    is_portable = False

    def __init__(self, base_layer: nn.Module, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        base: Any = base_layer
        self.convolve = next(function for kind, function in _FUNCTIONS.items() if isinstance(base, kind))
        self.stride, self.padding, self.groups = base.stride, base.padding, base.groups
        device, dtype = base.weight.device, getattr(torch, config.adapter_dtype)
        self.lora_A, self.lora_B = nn.Module(), nn.Module()
        for name, shape in self.tensor_shapes(base_layer, config, r).items():
            half, _, tensor = name.partition(".")
            if tensor:
                owner = self.get_submodule(half)
                owner.register_parameter(tensor, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @classmethod
    def tensor_shapes(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """A ``(R, I, K...)`` and B ``(O, R / G, 1...)``."""
        base: Any = base_layer
        bias = {"lora_B.bias": (base.out_channels,)} if config.lora_bias else {}
        return bias | {
            "lora_A.weight": (r, base.in_channels, *base.kernel_size),
            "lora_B.weight": (base.out_channels, r // base.groups, *(1 for _ in base.kernel_size)),
        }

    @classmethod
    def refusal(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> str | None:
        """Of a rank that is none of its groups, and of a dilation."""
        base: Any = base_layer
        if r % base.groups:
            return f"its rank {r} has to be a multiple of its {base.groups} groups: set rank_pattern"
        if _dilated(base) and base.padding != "same":
            return "its dilation is unknown to PEFT's adapter, whose output then has another size"
        return None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, I, ...)`` to ``(N, O, ...)``, in the dtype that the base layer returns."""
        out = self.base_layer(x)
        if not self.enabled or self.merged:
            return out
        return (out + self.added(self.dropped(x))).to(out.dtype)

    def dropped(self, x: Tensor) -> Tensor:
        """What the adapter sees of the input."""
        dropout = self.config.lora_dropout if self.training else 0.0
        return F.dropout(x, dropout) if dropout else x

    def added(self, x: Tensor) -> Tensor:
        """What the adapter adds to the output, in its own dtype (as PEFT does)."""
        lora_A, lora_B = self.factors()
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(lora_A.dtype)
        down = self.convolve(x, lora_A, None, self.stride, self.padding)
        return self.convolve(down, lora_B, self.added_bias, groups=self.groups) * self.scaling

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``(R, I, K...)`` and B ``(O, R / G, 1...)``."""
        return cast(nn.Parameter, self.lora_A.weight), cast(nn.Parameter, self.lora_B.weight)

    @property
    def added_bias(self) -> nn.Parameter | None:
        """That of B."""
        return getattr(self.lora_B, "bias", None)

    def delta_weight(self) -> Tensor:
        """``scaling * B @ A``, ``(O, I, K...)``."""
        lora_A, lora_B = self.factors()
        return scaled_product(lora_B.flatten(1), lora_A.flatten(1), self.scaling).view(self.base_layer.weight.shape)

    @property
    def unmergeable(self) -> str | None:
        """Why the base's weight cannot stand for both."""
        base: Any = self.base_layer
        if self.groups > 1:
            return "its adapter reads the inputs of all groups, and a grouped convolution those of one"
        if _dilated(base) or base.padding_mode != "zeros":
            return "its adapter has neither dilation nor another padding than zeros"
        return super().unmergeable

    @property
    def base_is_plain(self) -> bool:
        """Not a subclass, and no hook waits for it."""
        return type(self.base_layer) in _FUNCTIONS and not base_weight.is_intercepted(self.base_layer)

    def start(self, fill: Callable[[Tensor], Any]) -> None:
        """Fill A, and B with zeros."""
        fill(self.factors()[0])
        for parameter in self.lora_B.parameters():
            nn.init.zeros_(parameter)

    def start_at_random(self) -> None:
        """As torch begins a convolution."""
        for half in self.factors():
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        if self.added_bias is not None:
            bound = 1 / math.sqrt(self.r // self.groups)
            nn.init.uniform_(self.added_bias, -bound, bound)

    def sample_input(self, generator: torch.Generator) -> Tensor:
        """Two that have a few places, in the dtype of the base."""
        base: Any = self.base_layer
        places = [d * (k - 1) + 1 + 2 * s for d, k, s in zip(base.dilation, base.kernel_size, base.stride, strict=True)]
        x = torch.randn(2, base.in_channels, *places, generator=generator, device="cpu")
        return x.to(base.weight.device, base.weight.dtype)


class DoRAConv(LoRAConv):
    """A convolution with a trained length for each of its outputs, as PEFT has it."""

    def __init__(self, base_layer: nn.Module, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        shape = self.tensor_shapes(base_layer, config, r)[MAGNITUDE]
        self.lora_magnitude_vector = nn.Parameter(self.factors()[1].new_empty(shape))

    @classmethod
    def tensor_shapes(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """Those of LoRA, and the lengths ``(1, O, 1...)``."""
        base: Any = base_layer
        lengths = {MAGNITUDE: (1, base.out_channels, *(1 for _ in base.kernel_size))}
        return super().tensor_shapes(base_layer, config, r) | lengths

    @classmethod
    def refusal(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> str | None:
        """Also of groups."""
        if cast(Any, base_layer).groups > 1:
            return "DoRA's lengths would be those of a weight that a grouped convolution does not have"
        return super().refusal(base_layer, config, r)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, I, ...)`` to ``(N, O, ...)``."""
        base, out = self.base_layer, self.base_layer(x)
        if not self.enabled or self.merged:
            return out
        scale, scaled = self.lengths(), out
        if (dropped := self.dropped(x)) is not x:
            # As PEFT: the base's own output keeps its whole input, and what is added to it has the dropped one.
            scaled = self.convolve(dropped, base.weight, None, base.stride, base.padding, base.dilation)
        elif base.bias is not None:
            scaled = scaled - base.bias.view(-1, *(1 for _ in base.kernel_size))
        return (out + (scale - 1) * scaled + scale * self.added(dropped)).to(out.dtype)

    def lengths(self) -> Tensor:
        """Factor on each output, ``(1, O, 1...)``."""
        return self.lora_magnitude_vector / self._norms().to(self.lora_magnitude_vector.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        norms = (self.base_layer.weight + self.delta_weight()).flatten(1).norm(dim=1)
        return norms.view(self.lora_magnitude_vector.shape)

    @torch.no_grad()
    def finish_start(self) -> None:
        """The lengths begin as they are."""
        self.lora_magnitude_vector.copy_(self._norms())

    def merged_weight(self) -> Tensor:
        """``(O, I, K...)``."""
        weight: Any = self.read_base()
        merged = weight + self.delta_weight()
        return (merged * self.lengths().detach().to(merged.dtype).transpose(0, 1)).to(weight.dtype)


def _dilated(base: Any) -> bool:
    """Whether places between those that the kernel reads are left out."""
    return any(d > 1 and k > 1 for d, k in zip(base.dilation, base.kernel_size, strict=True))
