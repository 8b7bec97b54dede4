"""``W + scaling * P.T @ Q`` that multiplies as the sum it is, and becomes one tensor only where nothing else is left.

Experts of a mixture share one 3-D parameter, which a model reads in ways of its own: expert by expert, by the indices
of a batch, or whole, into a grouped product. No layer is there to be wrapped. So the model is given this in place of
the parameter. Its own code runs, and whatever product it makes is taken apart by what torch calls it: ``x @ W``, and
``(x @ P.T) @ Q`` on top, for the rows that the model multiplies and for no others. Any other operation gets the sum as
a tensor, which is how PEFT does it throughout: right in any case, slower, and as large as all experts.

That needs no list of architectures. What it cannot see is an operation that torch does not show (a kernel of somebody
else's); that is what ``rewrites/routed_experts.py`` compares before a run.

Shapes: E experts, M and N rows and columns of a weight, R rank, S rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from lit_lora.adapters.functional import add_lora, lora_linear
from lit_lora.adapters.grouped_product import grouped_product
from lit_lora.kernels import products

_METADATA = {"device", "dtype", "is_cuda", "is_floating_point", "is_meta", "itemsize", "layout", "requires_grad"}


class FactoredWeight:
    """Takes the place of a parameter of a frozen module for the time of its forward.

    Args:
        weight: ``(M, N)`` or ``(E, M, N)``.
        P: ``(R, M)`` or ``(E, R, M)``.
        Q: ``(R, N)`` or ``(E, R, N)``.
        scaling: factor on the product.
        fused: one autograd function for base and adapter; else plain operations, for comparison.
    """

    def __init__(self, weight: Tensor, P: Tensor, Q: Tensor, scaling: float, *, fused: bool = True) -> None:
        self.weight, self.P, self.Q = weight, P, Q
        self.scaling, self.fused = scaling, fused

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func) or _PRODUCTS_BY_NAME.get(getattr(func, "__name__", "").lstrip("_"))
        if product is not None:
            result = product(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map(lambda leaf: leaf.summed if isinstance(leaf, cls) else leaf, (args, kwargs))
        return func(*args, **kwargs)

    @cached_property
    def summed(self) -> Tensor:
        """The sum as a tensor, with a gradient for P and Q. As PEFT: the factors in the dtype of the weight."""
        P, Q = self.P.to(self.weight.dtype), self.Q.to(self.weight.dtype)
        return self.weight + (P.mT * self.scaling) @ Q

    @property
    def shape(self) -> torch.Size:
        """As of the sum."""
        return self.weight.shape

    @property
    def ndim(self) -> int:
        """Of the sum."""
        return self.weight.ndim

    @property
    def mT(self) -> FactoredWeight:
        """The last two dimensions exchanged."""
        return FactoredWeight(self.weight.mT, self.Q, self.P, self.scaling, fused=self.fused)

    def size(self, dim: int | None = None) -> Any:
        """As of the sum."""
        return self.weight.size() if dim is None else self.weight.size(dim)

    def dim(self) -> int:
        """Of the sum."""
        return self.weight.ndim

    def __len__(self) -> int:
        return len(self.weight)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Factored where these are the last two dimensions."""
        last_two = {dim0 % self.ndim, dim1 % self.ndim} == {self.ndim - 2, self.ndim - 1}
        return self.mT if last_two else self.summed.transpose(dim0, dim1)

    def t(self) -> Any:
        """The transpose of a matrix."""
        return self.mT if self.ndim == 2 else self.summed.t()

    def contiguous(self) -> FactoredWeight:
        """Products take any layout."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where nothing changes."""
        weight = self.weight.to(*args, **kwargs)
        return self if weight is self.weight else self.summed.to(*args, **kwargs)

    def __getitem__(self, index: Any) -> Any:
        if self.ndim != 3:
            return self.summed[index]
        if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32) and index.ndim == 1:
            return GatheredWeight(self, index)
        if isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point()):
            number = int(index)  # a wait on CUDA, in code that looks its experts up one by one
            (Ps, Qs) = self._by_expert
            return FactoredWeight(self.weight[number], Ps[number], Qs[number], self.scaling, fused=self.fused)
        return self.summed[index]

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # a protocol that it does not have
            raise AttributeError(name)
        return getattr(self.weight if name in _METADATA else self.summed, name)

    @cached_property
    def _by_expert(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        # All at once: the gradient of an expert that is looked up alone is as large as that of all.
        return self.P.unbind(0), self.Q.unbind(0)

    def multiplied(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ self + bias`` for a matrix, ``(..., M)`` to ``(..., N)``."""
        weight, lora_A, lora_B = self.weight.t(), self.P, self.Q.t()
        if not self.fused:
            return add_lora(F.linear(x, weight, bias), x, lora_A, lora_B, self.scaling)
        num_rows = len(x)
        if x.ndim == 2 and num_rows:  # rows of zeros, where another number of rows would take another kernel
            x = F.pad(x, (0, 0, 0, products.shared_num_rows(num_rows, x, weight) - num_rows))
        return lora_linear(x, weight, bias, lora_A, lora_B, self.scaling)[:num_rows]


class GatheredWeight(FactoredWeight):
    """One matrix for each row of a batch, by the number of the row's expert; made only where nothing else is left.

    Args:
        experts: what the matrices are taken of, ``(E, M, N)``.
        index: of each row's expert, ``(S,)``.
    """

    def __init__(self, experts: FactoredWeight, index: Tensor) -> None:
        self.experts, self.index = experts, index
        self.scaling, self.fused = experts.scaling, experts.fused

    @cached_property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A copy of each row's expert."""
        return self.experts.weight[self.index]

    @cached_property
    def P(self) -> Tensor:  # type: ignore[override]
        """Likewise."""
        return self.experts.P[self.index]

    @cached_property
    def Q(self) -> Tensor:  # type: ignore[override]
        """Likewise."""
        return self.experts.Q[self.index]

    @property
    def shape(self) -> torch.Size:
        """As of the copies."""
        return torch.Size([len(self.index), *self.experts.shape[1:]])

    @property
    def ndim(self) -> int:
        """Of the copies."""
        return 3

    def size(self, dim: int | None = None) -> Any:
        """As of the copies."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Of the copies."""
        return 3

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mT(self) -> FactoredWeight:
        """The last two dimensions exchanged."""
        return GatheredWeight(self.experts.mT, self.index)

    def sorted_product(self, x: Tensor) -> Tensor:
        """``(S, 1, M)`` to ``(S, 1, N)``, the rows brought into the order of their experts and back."""
        index, order = self.index.sort(stable=True)
        experts = self.experts
        ends = torch.searchsorted(index, torch.arange(len(experts), device=index.device, dtype=index.dtype), right=True)
        y = grouped_product(x.squeeze(1)[order], experts.weight, experts.P, experts.Q, ends, self.scaling)
        return y[order.argsort()].unsqueeze(1)


def _add_operators() -> None:
    """Arithmetic with an operator, such as ``2 * W``, is with the sum."""

    def operator(name: str) -> Callable[..., Any]:
        return lambda self, *others: getattr(self.summed, name)(*others)

    for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg"):
        setattr(FactoredWeight, f"__{name}__", operator(f"__{name}__"))


_add_operators()


# ---------------------------------------------------------------------- products; NotImplemented for other operands


def _linear(x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, FactoredWeight) or weight.ndim != 2 or not isinstance(x, Tensor):
        return NotImplemented
    return weight.mT.multiplied(x, bias)


def _matmul(left: Any, right: Any) -> Any:
    if isinstance(right, FactoredWeight) and isinstance(left, Tensor):
        if right.ndim == 2:
            return right.multiplied(left)
        return _batched(left, right) if left.ndim == 3 and len(left) == len(right) else NotImplemented
    if isinstance(left, FactoredWeight) and isinstance(right, Tensor) and left.ndim == right.ndim == 3:
        return _batched(right.mT, left.mT).mT if len(left) == len(right) else NotImplemented
    return NotImplemented


def _batched(x: Tensor, weight: FactoredWeight) -> Tensor:
    """``(E, S, M) @ (E, M, N)``."""
    on_cuda, autocast = x.is_cuda, torch.is_autocast_enabled(x.device.type)
    if isinstance(weight, GatheredWeight) and x.shape[1] == 1 and not on_cuda and not autocast:
        return weight.sorted_product(x)
    out = torch.bmm(x, weight.weight)
    return (out + _adapter(x, weight, torch.bmm)).to(out.dtype)


def _grouped(x: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """``F.grouped_mm(x, weight, offs=...)``: rows sorted by expert, ``offs`` where each expert's end."""
    offs = kwargs.pop("offs", args[0] if args else None)
    plain = isinstance(x, Tensor) and x.ndim == 2 and isinstance(weight, FactoredWeight) and weight.ndim == 3
    if not plain or offs is None or len(args) > 1 or any(value is not None for value in kwargs.values()):
        return NotImplemented
    return grouped_product(x, weight.weight, weight.P, weight.Q, offs, weight.scaling)


def _adapter(x: Tensor, weight: FactoredWeight, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """In the dtype of the factors, as PEFT's linear layers; autocast converts by itself."""
    if not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.P.dtype)
    return product(product(x, weight.P.mT), weight.Q) * weight.scaling


_PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
}
"""What torch calls a product -> how it is made. Of what is not here, the sum is taken."""

_PRODUCTS_BY_NAME = {"grouped_mm": _grouped, "grouped_mm_fallback": _grouped}
"""torch's, which shows itself by a private name, and the one that transformers defines when it is imported."""
