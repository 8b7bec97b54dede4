"""What every adapter around a frozen layer has in common.

Parameters are named as PEFT names them on disk. A wrapper answers for ``weight`` and ``bias`` of what it wraps, because
models read them (tied heads, dtype checks) and transformers assigns them (``tie_weights``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_lora.base import base_weight
from lit_lora.config import LoRAConfig

FORWARDED = ("weight", "bias")
"""What a wrapper answers for."""


class LoRALayer(nn.Module, ABC):
    """A frozen layer with a low-rank addition to its weight: ``W + scaling * B @ A``.

    What a kind of layer has of its own are its members; whoever starts, merges or writes adapters asks for these, not
    for the kind.
    """

    tensor_names: ClassVar[tuple[str, str]]
    """Of A and B, below the layer's name, as PEFT writes them."""

    has_fast_path: bool = False
    """Whether base and adapter may be computed by one function; to be switched off."""

    is_portable: ClassVar[bool] = True
    """Whether A and B are two matrices that other tools put on a linear layer."""

    not_by_rows: ClassVar[str | None] = None
    """Why it cannot be called with some rows of a batch; None if it can."""

    base_layer: Any
    """The frozen layer."""

    enabled: bool
    """False: the layer acts as its base layer."""

    original_weight: tuple[nn.Parameter] | None
    """While the adapter is folded into the base weight: the weight before. A tuple, to not register it."""

    original_bias: tuple[nn.Parameter] | None
    """The same of the base's bias, where the adapter has one of its own."""

    def __init__(self, base_layer: nn.Module, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = self.scale(config, r, lora_alpha)
        self.enabled = True
        self.original_weight = self.original_bias = None

    @classmethod
    def scale(cls, config: LoRAConfig, r: int, lora_alpha: float) -> float:
        """Factor on ``B @ A``."""
        return config.scaling(r, lora_alpha)

    @classmethod
    def tensor_shapes(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """What an adapter around this layer consists of, by names below the layer's."""
        raise NotImplementedError

    @classmethod
    def refusal(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> str | None:
        """Why this layer can have no such adapter; None if it can."""
        return None

    @abstractmethod
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The trainable matrices, A ``(r, in)`` and B ``(out, r)``."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """What merging adds to the base weight, in the layout of ``read_base``, at least float32."""

    def read_base(self) -> Tensor:
        """The frozen weight."""
        return self.base_parameter

    def write_base(self, weight: Tensor) -> None:
        """Put a new, frozen weight in the place of the old one, in the layout of ``read_base``."""
        owner, name = self.held
        setattr(owner, name, nn.Parameter(weight, requires_grad=False))

    def merged_weight(self) -> Tensor:
        """What merging puts in the place of the base weight: summed in the wider dtype, rounded to that of the base."""
        weight = self.read_base()
        return (weight + self.delta_weight()).to(weight.dtype)

    @property
    def added_bias(self) -> nn.Parameter | None:
        """A bias that the adapter has of its own, before it is scaled."""
        return None

    def merged_bias(self) -> Tensor | None:
        """What merging puts in the place of the base's bias; None where that stays."""
        if self.added_bias is None:
            return None
        return (self.base_layer.bias + self.added_bias.detach() * self.scaling).to(self.base_layer.bias.dtype)

    @property
    def unmergeable(self) -> str | None:
        """Why there is no weight that stands for base and adapter; None if there is."""
        if self.added_bias is not None and self.base_layer.bias is None:
            return "its adapter has a bias (lora_bias), and the layer has none to add it to"
        return None

    def finish_start(self) -> None:
        """Fill what follows from base, A and B."""

    @abstractmethod
    def start(self, fill: Callable[[Tensor], Any]) -> None:
        """Fill the half that starts non-zero, and the other one with zeros."""

    @abstractmethod
    def start_at_random(self) -> None:
        """Fill both halves, so that the adapter changes the output from the start."""

    @property
    def starts_nonzero(self) -> nn.Parameter:
        """The half that does: A, but for embeddings."""
        return self.factors()[0]

    @abstractmethod
    def sample_input(self, generator: torch.Generator) -> Tensor:
        """A small batch that the layer takes, on its device."""

    def widened(self, lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """A and B of a higher rank that come to the same, padded with zeros."""
        return padded(lora_A, lora_B, r)

    @property
    def held(self) -> tuple[nn.Module, str]:
        """The module that holds the frozen weight, and what it is called there."""
        return self.base_layer, "weight"

    @property
    def base_parameter(self) -> Tensor:
        """The frozen weight as it is held, which may be quantized."""
        owner, name = self.held
        return getattr(owner, name)

    @property
    @abstractmethod
    def base_is_plain(self) -> bool:
        """Whether the class of the base is known to do with its weight what the adapter is added to, and no more."""

    @property
    def is_quantized(self) -> bool:
        """Whether the base weight is stored in 4 or 8 bits."""
        return base_weight.is_quantized(self.base_layer)

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the base weight, so that the base layer alone gives the result."""
        return self.original_weight is not None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FORWARDED:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """Rank and scale, for ``print(model)``."""
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}"


class WithAttributesOfBase(nn.Module):
    """Beside :class:`LoRALayer`, where a model reads attributes of the layer that it owns (number of experts, ...)."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def bare_linear(
    num_in: int, num_out: int, *, device: torch.device, dtype: torch.dtype, bias: bool = False
) -> nn.Linear:
    """A linear layer with an unset weight: building it draws no random numbers."""
    linear = nn.Linear(num_in, num_out, bias=bias, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(torch.empty(num_out, num_in, device=device, dtype=dtype))
    if bias:
        linear.bias = nn.Parameter(torch.empty(num_out, device=device, dtype=dtype))
    return linear


def padded(lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A ``(r, in)`` and B ``(out, r)`` with zeros in the place of the ranks that they do not have."""
    more = r - len(lora_A)
    wider_A = torch.cat([lora_A, lora_A.new_zeros(more, lora_A.shape[1])])
    return wider_A, torch.cat([lora_B, lora_B.new_zeros(lora_B.shape[0], more)], dim=1)


def scaled_product(lora_B: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """``scaling * B @ A``, at least float32, without a graph."""
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    return (lora_B.detach().to(dtype) @ lora_A.detach().to(dtype)).mul_(scaling)
