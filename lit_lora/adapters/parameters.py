"""Adapters on parameters that no layer holds alone: the fused experts of a mixture, a router's weight.

PEFT's ``target_parameters``. A wrapper takes the place of the module that owns the parameter; for a second one of the
same module a second wrapper stands around the first, as in PEFT, so that names in the model are those on disk. Of one
3-D parameter, the A of all experts are one matrix ``(E * r, in)``, and the B one of ``(out, r * E)``.

Experts can have ranks of their own, up to that of the parameter: the rest of their A and B are zeros, which get no
gradient, so they stay so wherever it is trained.

Shapes: E experts, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lit_lora.adapters.factored_weight import FactoredWeight
from lit_lora.adapters.layers import lora_layers
from lit_lora.adapters.lora_layer import LoRALayer, WithAttributesOfBase, bare_linear
from lit_lora.adapters.packed_attention import LoRAOutput
from lit_lora.base.quantized_experts import QuantizedExperts
from lit_lora.base.shards import device_of
from lit_lora.config import LoRAConfig


class LoRAParameter(WithAttributesOfBase, LoRALayer):
    """An adapter on one parameter of two or three dimensions, of a module that computes with it in its own way.

    Args:
        base_layer: the module that owns the parameter, or another wrapper around it.
        parameter_name: below the owner.
        config: as for every layer.
        r: rank, of each expert.
        lora_alpha: numerator of the scale.
        expert_ranks: of each expert, at most ``r``; None where all have ``r``.
    """

    tensor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    has_fast_path = True
    not_by_rows = "whose experts see tokens of all rows together"

    def __init__(
        self,
        base_layer: nn.Module,
        parameter_name: str,
        config: LoRAConfig,
        *,
        r: int,
        lora_alpha: float,
        expert_ranks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        self.parameter_name = parameter_name
        self.expert_ranks = expert_ranks
        self.routed = True
        weight = self.base_parameter
        self.num_experts, num_in, num_out = factor_sizes(self.owner, weight)
        self.is_transposed = is_transposed(self.owner, weight)
        device, dtype = device_of(weight), getattr(torch, config.adapter_dtype)
        self.lora_A = bare_linear(num_in, r * self.num_experts, device=device, dtype=dtype)
        self.lora_B = bare_linear(r * self.num_experts, num_out, device=device, dtype=dtype)

    @property
    def owner(self) -> nn.Module:
        """The module of the model that holds the parameter."""
        inner = self.base_layer
        return inner.owner if isinstance(inner, LoRAParameter) else inner

    @property
    def held(self) -> tuple[nn.Module, str]:
        """The owner, and the parameter's name."""
        return self.owner, self.parameter_name

    @property
    def base_parameter(self) -> Tensor:
        """The parameter itself, also where something stands in its place."""
        return dict(self.owner.named_parameters(recurse=False))[self.parameter_name]

    @property
    def base_is_plain(self) -> bool:
        """The adapter is one of the parameter, whatever the module does with that."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, which finds the adapted parameter in the place of its own."""
        if not self.enabled or self.merged:
            return self.base_layer(*args, **kwargs)
        owner, adapted = self.owner, self.adapted_weight()
        # An attribute of the instance is found before a parameter, which stays where it is.
        taken_apart = self.routed and not adapted.weight.requires_grad
        owner.__dict__[self.parameter_name] = adapted if taken_apart else adapted.summed
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            del owner.__dict__[self.parameter_name]

    def adapted_weight(self) -> FactoredWeight:
        """The parameter and its adapter."""
        A, B = self._factors_by_expert(self.lora_A.weight, self.lora_B.weight)
        B = B.contiguous()  # lies in memory with the experts innermost
        weight = self.base_parameter
        A, B = (A, B) if weight.ndim == 3 else (A[0], B[0])
        P, Q = (A, B) if self.is_transposed else (B, A)
        return FactoredWeight(weight, P, Q, self.scaling, fused=self.has_fast_path)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``(E * r, in)`` and B ``(out, r * E)``."""
        return cast(nn.Parameter, self.lora_A.weight), cast(nn.Parameter, self.lora_B.weight)

    def delta_weight(self) -> Tensor:
        """``scaling * B @ A`` of each expert, in the layout of the parameter."""
        dtype = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        A, B = self._factors_by_expert(*(factor.detach().to(dtype) for factor in self.factors()))
        delta = (B.mT @ A).mul_(self.scaling)
        delta = delta.mT if self.is_transposed else delta
        return delta if self.base_parameter.ndim == 3 else delta[0]

    def start(self, fill: Callable[[Tensor], Any]) -> None:
        """Fill A, and B with zeros."""
        fill(self.lora_A.weight)
        nn.init.zeros_(self.lora_B.weight)
        self._zero_beyond_ranks()

    def start_at_random(self) -> None:
        """Kaiming-uniform A and B."""
        for half in self.factors():
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        self._zero_beyond_ranks()

    def widened(self, lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """Each expert's factors at rank ``r``."""
        A, B = self._factors_by_expert(lora_A, lora_B)
        more = r - self.r
        A, B = (torch.cat([half, half.new_zeros(len(half), more, half.shape[2])], dim=1) for half in (A, B))
        return A.flatten(0, 1), B.permute(2, 1, 0).flatten(1, 2)

    def sample_input(self, generator: torch.Generator) -> Tensor:
        """What its module takes is not known."""
        raise TypeError(f"{type(self.owner).__name__} takes what it takes")

    @property
    def is_quantized(self) -> bool:
        """Whether the experts are held in 4 or 8 bits."""
        return isinstance(self.base_parameter, QuantizedExperts)

    def _factors_by_expert(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """A ``(E, R, in)`` and B ``(E, R, out)``: PEFT's layout, in which B has the experts innermost."""
        A = lora_A.view(self.num_experts, self.r, -1)
        return A, lora_B.view(-1, self.r, self.num_experts).permute(2, 1, 0)

    @torch.no_grad()
    def _zero_beyond_ranks(self) -> None:
        for half in self._factors_by_expert(*self.factors()):
            for expert, rank in enumerate(self.expert_ranks or []):
                half[expert, rank:] = 0

    def extra_repr(self) -> str:
        """With the parameter's name."""
        return f"{self.parameter_name!r}, {super().extra_repr()}"


def factor_sizes(owner: nn.Module, parameter: Tensor) -> tuple[int, int, int]:
    """Experts, inputs and outputs that PEFT's factors have for a parameter of this module."""
    if parameter.ndim == 2:
        return 1, parameter.shape[1], parameter.shape[0]
    num_experts, rows, columns = parameter.shape
    return (num_experts, rows, columns) if is_transposed(owner, parameter) else (num_experts, columns, rows)


def is_transposed(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether inputs come first, as PEFT sees it: by an attribute that transformers gives to some of such modules."""
    return parameter.ndim == 3 and bool(getattr(owner, "is_transposed", False))


def nested_name(module_name: str, depth: int) -> str:
    """Of the wrapper with ``depth`` others around it."""
    return module_name + ".base_layer" * depth


def target_name(name: str, layer: LoRALayer) -> str:
    """What a configuration calls what is adapted: the layer by its name, a parameter by the name that it had.

    An attention and its output are one.
    """
    if isinstance(layer, LoRAOutput):
        return name.removesuffix(".base_layer.out_proj")
    if not isinstance(layer, LoRAParameter):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def targeted_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """The LoRA layers of a model by what a configuration calls them."""
    for name, layer in lora_layers(model):
        yield target_name(name, layer), layer


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """3-D parameters without a gradient that no adapter is on, by their names without wrappers."""
    adapted = {id(layer.base_parameter) for _, layer in lora_layers(model)}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and min(parameter.shape) > 1
        and not parameter.requires_grad
        and id(parameter) not in adapted
    }
