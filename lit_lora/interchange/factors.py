"""What an adapter adds to a layer as matrices, whatever the layer is.

A convolution's kernel is a matrix with a row for each output. What has several matrices in one tensor, the groups of a
convolution or fused experts, is taken apart, and all that follows is done for all of them at once.

Shapes: P parts where there are several, I inputs (of a convolution: channels times places of its kernel), O outputs (of
an embedding: V tokens, D hidden, with A ``(R, V)`` and B ``(D, R)``), R rank, E experts, G groups, K... kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ENDS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""What A is called below its layer -> what B is."""


class Layout(NamedTuple):
    """How matrices lie in the tensors of a file."""

    end_of_A: str
    """What A is called below its layer."""
    kernel: tuple[int, ...] = ()
    """Of a convolution."""
    parts: int = 1
    of: Literal["groups", "experts"] = "groups"
    """What the parts are: groups share the rank, experts have each their own."""

    @property
    def unit(self) -> int:
        """The rank is a multiple of it."""
        return self.parts if self.of == "groups" else 1

    def apart(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """A ``(R, I)`` and B ``(O, R)`` of tensors as they are stored, with P before them where there are several."""
        if self.of == "experts":  # as PEFT, whose B has the experts innermost
            r = len(lora_A) // self.parts
            return lora_A.view(self.parts, r, -1), lora_B.view(len(lora_B), r, self.parts).permute(2, 0, 1)
        lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
        if self.parts == 1:
            return lora_A, lora_B
        return lora_A.unflatten(0, (self.parts, -1)), lora_B.unflatten(0, (self.parts, -1))

    def together(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`apart`."""
        if self.of == "experts":
            return lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)
        if self.parts > 1:
            lora_A, lora_B = lora_A.flatten(0, 1), lora_B.flatten(0, 1)
        if self.kernel:
            lora_A = lora_A.unflatten(1, (-1, *self.kernel))
            lora_B = lora_B.view(*lora_B.shape, *(1 for _ in self.kernel))
        return lora_A, lora_B


class Factors(NamedTuple):
    """What an adapter adds to one layer: ``scaling * B @ A``, of each part where there are several."""

    lora_A: Tensor
    """``(R, I)`` or ``(P, R, I)``."""
    lora_B: Tensor
    """``(O, R)`` or ``(P, O, R)``."""
    scaling: float
    layout: Layout

    @property
    def r(self) -> int:
        """Rank, as a configuration counts it."""
        return self.lora_A.shape[-2] * self.layout.unit

    @property
    def sizes(self) -> str:
        """Of the layer, for messages."""
        size = f"{self.lora_A.shape[-1]} to {self.lora_B.shape[-2]}"
        parts = f", {self.layout.parts} {self.layout.of}" if self.layout.parts > 1 else ""
        return size + parts + (f", kernel {self.layout.kernel}" if self.layout.kernel else "")

    def product(self) -> Tensor:
        """``scaling * B @ A``, float32."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scaling

    def named(self, layer: str) -> dict[str, Tensor]:
        """Both as they are stored, by their names in the model."""
        lora_A, lora_B = self.layout.together(self.lora_A, self.lora_B)
        return {f"{layer}.{self.layout.end_of_A}": lora_A, f"{layer}.{ENDS[self.layout.end_of_A]}": lora_B}

    def padded(self, r: int) -> Factors:
        """The same at a higher rank, a multiple of the unit."""
        A, B = self.lora_A, self.lora_B
        more = r // self.layout.unit - A.shape[-2]
        wider_A = torch.cat([A, A.new_zeros(*A.shape[:-2], more, A.shape[-1])], dim=-2)
        return self._replace(lora_A=wider_A, lora_B=torch.cat([B, B.new_zeros(*B.shape[:-1], more)], dim=-1))


class Cut(NamedTuple):
    """A layer at a lower rank."""

    factors: Factors
    singular_values: Tensor
    """Of the layer before, of each part."""

    @property
    def error(self) -> float:
        """Frobenius norm of what is missing, relative to that of the layer."""
        return relative_error(self.singular_values, self.factors.lora_A.shape[-2])

    def at(self, r: int) -> Cut:
        """At a rank of each part that is lower still."""
        lora_A, lora_B = self.factors.lora_A[..., :r, :], self.factors.lora_B[..., :r]
        return self._replace(factors=self.factors._replace(lora_A=lora_A, lora_B=lora_B))


def truncated(factors: Sequence[Factors], weights: Sequence[float], r: int | None, dtype: torch.dtype) -> Cut:
    """The best sum of low rank of what several adapters add to a layer (Eckart-Young), and what it misses.

    The sum is not made: its singular values are those of a product of two triangles, of the sum of ranks each.

    Args:
        factors: of one layer.
        weights: one for each.
        r: rank of each part to keep; None for all.
        dtype: of the result.
    """
    double = torch.float64
    A = torch.cat([each.lora_A.to(double) for each in factors], dim=-2)
    B = torch.cat([each.lora_B.to(double) * each.scaling * w for each, w in zip(factors, weights, strict=True)], dim=-1)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    kept = S.shape[-1] if r is None else min(r, S.shape[-1])
    lora_A, lora_B = Vh[..., :kept, :] @ Q_A.mT, Q_B @ (U[..., :kept] * S[..., None, :kept])
    return Cut(Factors(lora_A.to(dtype), lora_B.to(dtype), 1.0, factors[0].layout), S)


def relative_error(singular_values: Tensor, r: int) -> float:
    """Frobenius norm of what rank ``r`` misses, relative to the whole."""
    whole = float(singular_values.norm())
    return float(singular_values[..., r:].norm()) / whole if whole else 0.0


def common_rank(factors: Sequence[Factors]) -> int:
    """The lowest rank that all of them can have."""
    unit = math.lcm(*(each.layout.unit for each in factors))
    return -(-max(each.r for each in factors) // unit) * unit
