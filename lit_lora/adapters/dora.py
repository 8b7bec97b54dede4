"""DoRA (arXiv:2402.09353): the adapted weight's rows keep a length of their own, which is trained beside A and B.

``W' = m * (W + s B A) / ||W + s B A||``, the norm per output, and a constant in the backward pass (section 4.3). The
product is that of LoRA; what DoRA adds is one pass over the weight in each forward, for the norms, and one scaled
copy of the output.

Shapes: I inputs, O outputs, R rank, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_lora.adapters.functional import add_lora, lora_linear
from lit_lora.adapters.layers import LoRAEmbedding, LoRALinear
from lit_lora.base import base_weight
from lit_lora.base.shards import weights_whole
from lit_lora.config import LoRAConfig

MAGNITUDE = "lora_magnitude_vector"
"""What the lengths are called below the layer, as PEFT writes them."""


class DoRALinear(LoRALinear):
    """A linear layer of any storage, with trained lengths of its rows."""

    def __init__(self, base_layer: nn.Module, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        lora_B = self.lora_B.weight
        self.lora_magnitude_vector = nn.Parameter(
            torch.empty(self.out_features, device=lora_B.device, dtype=lora_B.dtype)
        )

    @classmethod
    def tensor_shapes(cls, base_layer: nn.Module, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """Those of LoRA, and the lengths ``(out,)``."""
        lengths = {MAGNITUDE: (base_weight.linear_shape(base_layer)[0],)}
        return super().tensor_shapes(base_layer, config, r) | lengths

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """``(..., in)`` to ``(..., out)``; with ``up``, the input is ``silu(x) * up``."""
        if up is not None:
            x = F.silu(x) * up
        if not self.enabled or self.merged:
            return self.base_layer(x)
        lora_A, lora_B = self.factors()
        scale_O = self.lengths()
        dropout = self.config.lora_dropout if self.training else 0.0
        bias = self.base_layer.bias
        if dropout:
            # As PEFT: the base's own output keeps its whole input, and what is added to it has the dropped one.
            out, dropped = self.base_layer(x), F.dropout(x, dropout)
            base = self.base_layer(dropped)
            base = base if bias is None else base - bias
            adapter = add_lora(torch.zeros_like(base), dropped, lora_A, lora_B, self.scaling)
            return (out + (scale_O - 1) * base + scale_O * adapter).to(out.dtype)
        if self._takes_fast_path():
            operands = self.operands()
            out = lora_linear(x, operands.weight, None, lora_A, lora_B, self.scaling)
        else:
            out = self.base_layer(x)
            out = add_lora(out if bias is None else out - bias, x, lora_A, lora_B, self.scaling)
        scaled = (out * scale_O).to(out.dtype)
        return scaled if bias is None else scaled + bias.to(out.dtype)

    def can_be_fused(self) -> bool:
        """Its output is scaled, which no function for several layers does."""
        return False

    @torch.no_grad()
    def _norms(self, weight_OI: Tensor | None = None) -> Tensor:
        """Of the rows of ``W + s B A``, ``(O,)``; the product is not made."""
        lora_A, lora_B = (factor.float() for factor in self.factors())
        weight_OI = base_weight.read_weight(self.base_layer) if weight_OI is None else weight_OI
        weight_OI = weight_OI.to(lora_A.dtype)
        squares = weight_OI.square().sum(1) + 2 * self.scaling * (weight_OI @ lora_A.t() * lora_B).sum(1)
        squares = squares + self.scaling**2 * (lora_B @ (lora_A @ lora_A.t()) * lora_B).sum(1)
        return squares.clamp(min=0).sqrt()

    def lengths(self, weight_OI: Tensor | None = None) -> Tensor:
        """Factor on each output.

        Args:
            weight_OI: a copy of the base weight, if there is one.
        """
        return self.lora_magnitude_vector / self._norms(weight_OI).to(self.lora_magnitude_vector.dtype)

    @torch.no_grad()
    def finish_start(self) -> None:
        """The lengths begin as they are."""
        with weights_whole(self.base_layer):
            self.lora_magnitude_vector.copy_(self._norms())

    def merged_weight(self) -> Tensor:
        """``(O, I)``."""
        weight = self.read_base()
        merged = weight + self.delta_weight()
        # A weight of a mapped file lies where it does in the file, and a product rounds by that: a copy does not.
        lengths = self.lengths(weight.clone()).detach()
        return (merged * lengths.to(merged.dtype)[:, None]).to(weight.dtype)


class DoRAEmbedding(LoRAEmbedding):
    """An embedding with trained lengths of its columns, as PEFT has it."""

    def __init__(self, base_layer: nn.Embedding, config: LoRAConfig, *, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, config, r=r, lora_alpha=lora_alpha)
        lora_B = self.lora_embedding_B
        self.lora_magnitude_vector = nn.Parameter(torch.empty(len(lora_B), device=lora_B.device, dtype=lora_B.dtype))

    @classmethod
    def tensor_shapes(cls, base_layer: Any, config: LoRAConfig, r: int) -> dict[str, tuple[int, ...]]:
        """Those of LoRA, and the lengths ``(dim,)``."""
        return super().tensor_shapes(base_layer, config, r) | {MAGNITUDE: (base_layer.embedding_dim,)}

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``(...)`` to embeddings ``(..., dim)``."""
        out = super().forward(ids)
        return out if not self.enabled or self.merged else (out * self.lengths()).to(out.dtype)

    def lengths(self) -> Tensor:
        """Factor on each column."""
        return self.lora_magnitude_vector / self._norms().to(self.lora_magnitude_vector.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        return (self.base_layer.weight + self.delta_weight()).norm(dim=0)

    @torch.no_grad()
    def finish_start(self) -> None:
        """The lengths begin as they are."""
        with weights_whole(self.base_layer):
            self.lora_magnitude_vector.copy_(self._norms())

    def merged_weight(self) -> Tensor:
        """``(V, D)``."""
        weight: Any = self.read_base()
        merged = weight + self.delta_weight()
        return (merged * self.lengths().detach().to(merged.dtype)).to(weight.dtype)
