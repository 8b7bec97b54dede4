"""The modules that injection puts into a model: adapters around frozen layers, and trainable copies.

Parameters are named as PEFT names them on disk. A wrapper answers for ``weight`` and ``bias`` of what it wraps, because
models read them (tied heads, dtype checks) and transformers assigns them (``tie_weights``). One adapter at a time:
several are the matter of ``named_adapters.py``. Convolutions: ``convolution.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_lora.adapters.functional import add_lora, half_precision, lora_linear
from lit_lora.adapters.half_precision import Adapted, RoundedFactors, lora_linears, rounded_linear
from lit_lora.adapters.lora_layer import FORWARDED, LoRALayer, bare_linear, scaled_product
from lit_lora.adapters.module_names import plain_name
from lit_lora.adapters.shared_input import SharedInput
from lit_lora.adapters.trainable_tokens import TrainableTokens
from lit_lora.base import base_weight, shards
from lit_lora.config import LoRAConfig


class LoRALinear(LoRALayer):
    """An adapter around anything linear: ``nn.Linear``, ``Conv1D``, bitsandbytes' 4- and 8-bit layers."""

    tensor_names = ("lora_A.weight", "lora_B.weight")

    def __init__(self, base_layer: nn.Module, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        self.out_features, self.in_features = base_weight.linear_shape(base_layer)
        device, dtype = shards.device_of(self.base_layer.weight), getattr(torch, config.adapter_dtype)
        self.lora_A = bare_linear(self.in_features, r, device=device, dtype=dtype)
        self.lora_B = bare_linear(r, self.out_features, device=device, dtype=dtype, bias=config.lora_bias)
        # Looked up once: forwards should cost nothing, and torch.compile should see no lookups.
        self.has_fast_path = base_weight.is_known_product(base_layer)
        self.is_transposed = base_weight.is_conv1d(base_layer)
        self.may_be_quantized = base_weight.may_be_quantized(base_layer)
        self.shared_input: SharedInput | None = None
        self.rounded: RoundedFactors | None = None

    @classmethod
    def tensor_shapes(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """A ``(r, in)`` and B ``(out, r)``."""
        num_out, num_in = base_weight.linear_shape(base_layer)
        bias: dict[str, tuple[int, ...]] = {"lora_B.bias": (num_out,)} if config.lora_bias else {}
        return bias | {"lora_A.weight": (r, num_in), "lora_B.weight": (num_out, r)}

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """``(..., in)`` to ``(..., out)``, in the dtype that the base layer returns.

        With ``up``, ``(..., in)``, the input is ``silu(x) * up``; of the two results one is then kept for the backward.
        """
        adapts = self.enabled and not self.merged
        rounded = self.rounded
        if rounded is not None and adapts and x.dtype == rounded.unread.dtype and not torch.is_grad_enabled():
            return rounded_linear(x, up, self.base_layer.weight, self.base_layer.bias, rounded)
        decodes = self.may_be_quantized and base_weight.has_kernel_for(self.base_layer, x)
        dropout = self.config.lora_dropout if self.training and adapts else 0.0
        fast = not decodes and self.can_be_fused()
        if fast and up is None and self.shared_input is not None and torch.is_grad_enabled():
            out = self.shared_input.output(self, x, partial(_together, x))
            if out is not None:
                return out
        if up is not None and not fast:
            x, up = F.silu(x) * up, None
        if not adapts:
            return self.base_layer(x)
        if not fast:
            lora_A, lora_B = self.computed_factors()
            return add_lora(self.base_layer(x), x, lora_A, lora_B, self.scaling, dropout, self.added_bias)
        return lora_linear(x, *self.operands(), up)

    def operands(self) -> Adapted:
        """What the layer is computed from."""
        base: Tensor | nn.Module = self.base_layer
        if not (self.may_be_quantized and base_weight.is_quantized(self.base_layer)):
            base = self.base_layer.weight if not self.is_transposed else self.base_layer.weight.t()
        return Adapted(base, self._bias(), *self.computed_factors(), self.scaling)

    def _bias(self) -> Tensor | None:
        """That of the base and that of the adapter."""
        bias: Tensor | None = self.base_layer.bias
        if self.added_bias is None:
            return bias
        added = self.added_bias * self.scaling
        return added if bias is None else bias + added

    @property
    def added_bias(self) -> nn.Parameter | None:
        """That of B."""
        return self.lora_B.bias

    def computed_factors(self) -> tuple[Tensor, Tensor]:
        """What is multiplied: A and B, and what a kind of layer adds to them."""
        return self.factors()

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``(r, in)`` and B ``(out, r)``."""
        return cast(nn.Parameter, self.lora_A.weight), cast(nn.Parameter, self.lora_B.weight)

    def delta_weight(self) -> Tensor:
        """``scaling * B @ A``, ``(out, in)``."""
        return scaled_product(self.lora_B.weight, self.lora_A.weight, self.scaling)

    def read_base(self) -> Tensor:
        """``(out, in)``, whatever holds it."""
        return base_weight.read_weight(self.base_layer)

    def write_base(self, weight: Tensor) -> None:
        """``(out, in)``, into the layout of the base layer."""
        base_weight.write_weight_(self.base_layer, weight)

    @property
    def base_is_plain(self) -> bool:
        """Not a subclass, and no hook waits for it."""
        return base_weight.is_known_product(self.base_layer) and not base_weight.is_intercepted(self.base_layer)

    def start(self, fill: Callable[[Tensor], Any]) -> None:
        """Fill A, and B with zeros."""
        fill(self.lora_A.weight)
        for parameter in self.lora_B.parameters():
            nn.init.zeros_(parameter)

    def start_at_random(self) -> None:
        """Kaiming-uniform A and B, and a bias as torch begins one."""
        for half in self.factors():
            nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        if self.added_bias is not None:
            nn.init.uniform_(self.added_bias, -1 / math.sqrt(self.r), 1 / math.sqrt(self.r))

    def sample_input(self, generator: torch.Generator) -> Tensor:
        """Eight rows, in the dtype of the base."""
        x = torch.randn(8, self.in_features, generator=generator, device="cpu")
        return x.to(shards.device_of(self.base_layer.weight), self.base_layer.weight.dtype)

    def can_be_fused(self) -> bool:
        """Whether base and adapter are computed by one function now."""
        dropout = self.config.lora_dropout if self.training else 0.0
        return self.enabled and not self.merged and not dropout and self._takes_fast_path()

    def _takes_fast_path(self) -> bool:
        return (
            self.has_fast_path
            and not self.base_layer.weight.requires_grad
            and not base_weight.is_intercepted(self.base_layer)
        )


def _together(x: Tensor, layers: Sequence[LoRALinear]) -> Sequence[Tensor] | None:
    """The outputs of several layers for one input; None where half precision does not serve all of them."""
    if not all(layer.can_be_fused() for layer in layers):
        return None
    operands = [layer.operands() for layer in layers]
    dtypes = {half_precision(x, each.weight) for each in operands}
    dtype = dtypes.pop()
    return None if dtypes or dtype is None else lora_linears(x, operands, dtype)


class LoRAEmbedding(LoRALayer):
    """An adapter around an embedding; A holds one column per token."""

    tensor_names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Embedding, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx = base_layer.padding_idx
        device, dtype = shards.device_of(base_layer.weight), getattr(torch, config.adapter_dtype)
        self.lora_embedding_A = nn.Parameter(torch.empty(r, self.num_embeddings, device=device, dtype=dtype))
        self.lora_embedding_B = nn.Parameter(torch.empty(self.embedding_dim, r, device=device, dtype=dtype))

    @classmethod
    def tensor_shapes(cls, base_layer: Any, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """A ``(r, vocab)`` and B ``(dim, r)``."""
        return {
            "lora_embedding_A": (r, base_layer.num_embeddings),
            "lora_embedding_B": (base_layer.embedding_dim, r),
        }

    @classmethod
    def refusal(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> str | None:
        """Of a bias."""
        return "lora_bias is not for embeddings, in PEFT either" if config.lora_bias else None

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``(...)`` to embeddings ``(..., dim)``, in the dtype that the base layer returns."""
        out = self.base_layer(ids)
        if not self.enabled or self.merged:
            return out
        base: Any = self.base_layer
        while isinstance(base, LoRAEmbedding):  # of another adapter
            base = base.base_layer
        # As PEFT: the same options as the base, so that a padding token gets no gradient.
        down = F.embedding(
            ids,
            self.lora_embedding_A.T,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )
        added = (down @ self.lora_embedding_B.T) * self.scaling
        # Gemma scales inside its embedding layer; the adapter is part of the weight, so it is scaled too.
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            added = added * (scale.to(added.dtype) if isinstance(scale, Tensor) else scale)
        return (out + added).to(out.dtype)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``(r, vocab)`` and B ``(dim, r)``."""
        return self.lora_embedding_A, self.lora_embedding_B

    def delta_weight(self) -> Tensor:
        """``scaling * (B @ A).T``, ``(vocab, dim)``."""
        return scaled_product(self.lora_embedding_B, self.lora_embedding_A, self.scaling).t()

    @property
    def base_is_plain(self) -> bool:
        """Not a subclass, no hook waits for it, and it does not change its weight."""
        base: Any = self.base_layer
        return type(base) is nn.Embedding and base.max_norm is None and not base_weight.is_intercepted(base)

    def start(self, fill: Callable[[Tensor], Any]) -> None:
        """Zero A, normal B whatever ``fill``: the reverse of a linear layer, as in the reference implementation."""
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    def start_at_random(self) -> None:
        """Normal A and B."""
        for half in self.factors():
            nn.init.normal_(half)

    @property
    def starts_nonzero(self) -> nn.Parameter:
        """B."""
        return self.lora_embedding_B

    def sample_input(self, generator: torch.Generator) -> Tensor:
        """Token ids."""
        return torch.randint(self.num_embeddings, (64,), generator=generator, device="cpu").to(
            shards.device_of(self.base_layer.weight)
        )


class TrainableCopy(nn.Module):
    """A module of ``modules_to_save``: a copy is trained in full, the original stays, frozen, for comparison.

    The copy is in the adapter's dtype. Where that differs from what comes in, inputs are converted for the copy and
    its outputs converted back. A copy of a layer that is tied to another one is not tied to it.
    """

    def __init__(self, base_layer: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.enabled = True
        # Parameters are copied by hand: deepcopy would copy them in the wrong dtype, and fails for fake tensors.
        memo = {id(p): _trainable(p, getattr(torch, config.adapter_dtype)) for p in base_layer.parameters()}
        self.copy = copy.deepcopy(base_layer, memo)

    @property
    def active(self) -> Any:
        """The copy, or the original while disabled."""
        return self.copy if self.enabled else self.base_layer

    @property
    def weight(self) -> Tensor:
        """The active module's weight."""
        return self.active.weight

    @property
    def bias(self) -> Tensor | None:
        """The active module's bias."""
        return self.active.bias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active module returns."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        parameter = next(iter(self.copy.parameters()))
        if torch.is_autocast_enabled(parameter.device.type):
            return self.copy(*args, **kwargs)
        outside = next(iter(self.base_layer.parameters())).dtype
        if outside == parameter.dtype:
            return self.copy(*args, **kwargs)
        args, kwargs = tree_map(lambda leaf: _convert_float(leaf, parameter.dtype), (args, kwargs))
        return tree_map(lambda leaf: _convert_float(leaf, outside), self.copy(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        # A model may read any attribute of a module that it owns (layer types, epsilons, ...).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("copy", "base_layer"):
                raise
            return getattr(self.active, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers' tie_weights assigns the weight: that concerns the original, a copy is never tied.
        if name in FORWARDED:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """The LoRA layers of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALayer):
            yield plain_name(name), module


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, LoRALayer | TrainableCopy | TrainableTokens]]:
    """The LoRA layers, trainable copies and trainable rows of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, (LoRALayer, TrainableCopy, TrainableTokens)):
            yield plain_name(name), module


def _trainable(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    kind = dtype if parameter.is_floating_point() else parameter.dtype
    return nn.Parameter(shards.whole(parameter.detach()).to(kind, copy=True), kind.is_floating_point)


def _convert_float(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
