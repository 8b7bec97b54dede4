"""A frozen 3-D parameter of fused experts that is held in 4 or 8 bits, and stands for the tensor that it was.

Models read such a parameter in ways of their own: expert by expert, transposed, whole into a grouped product. So this
is a tensor by its shape and type, which holds codes and scales. An expert that is picked and a transpose are such
tensors too, without values yet; any other operation gets the values, computed for it and dropped after it. What
autograd keeps for the backward pass is the tensor that it was given, so codes, and the backward pass computes the
values again.

Experts are quantized one by one. Codes and scales of 4 bits are bitsandbytes'; those of 8 bits are int8, with one scale
for each row. Left out: writing to it, and dividing it among processes.

Shapes: E experts, M and N rows and columns of each, K bytes of an expert's codes, L its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_lora.base import base_weight


class Codes(NamedTuple):
    """What is held of a parameter."""

    codes: Tensor
    """uint8 ``(E, K, 1)``, or int8 ``(E, M, N)``."""
    scales: Tensor
    """Of each block, ``(E, L)``: float32, or codes in 8 bits. Or of each row, float32 ``(E, M)``."""
    scales_of_scales: Tensor | None
    """Of 256 scales each, with double quantization."""
    offset: Tensor | None
    """Of scales that are codes, ``(E,)``."""
    quant_type: str
    """``nf4``, ``fp4`` or ``int8``."""
    block_size: int
    dtype: torch.dtype
    """That it was quantized from."""
    shape: tuple[int, int]
    """Of an expert."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By their names."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}

    def each(self, function: Callable[[Tensor], Tensor]) -> Codes:
        """The same of ``function`` of each tensor."""
        made: Any = {name: function(tensor) for name, tensor in self.tensors.items()}
        return self._replace(**made)

    def matrix(self, expert: int) -> Tensor:
        """The values of one expert, ``(M, N)``."""
        codes, scales = self.codes[expert], self.scales[expert]
        if self.quant_type == "int8":
            return codes.to(torch.float32).mul_(scales.unsqueeze(-1)).to(self.dtype)
        functional = base_weight.bitsandbytes().functional
        nested = None
        if self.scales_of_scales is not None:
            nested = functional.QuantState(
                absmax=self.scales_of_scales[expert], code=_codes_of_scales(codes.device), blocksize=256,
                dtype=torch.float32,
            )  # fmt: skip
        state = functional.QuantState(
            absmax=scales, shape=torch.Size(self.shape), code=_values_of_codes(self.quant_type, codes.device),
            blocksize=self.block_size, quant_type=self.quant_type, dtype=self.dtype,
            offset=None if self.offset is None else self.offset[expert], state2=nested,
        )  # fmt: skip
        if codes.device.type == "cpu" and self.shape[1] % self.block_size:
            # With AVX512 bitsandbytes (0.50) takes the scales of other blocks where blocks run over the ends of rows.
            return base_weight.look_up_4bit(codes, state)
        return base_weight.dequantize_4bit(codes, state)


@cache
def _values_of_codes(quant_type: str, device: torch.device) -> Tensor:
    with unset_fake_temporarily():  # what is kept is no fake one
        return base_weight.bitsandbytes().functional.get_4bit_type(quant_type, device=device)


@cache
def _codes_of_scales(device: torch.device) -> Tensor:
    with unset_fake_temporarily():
        return base_weight.bitsandbytes().functional.create_dynamic_map().to(device)


class QuantizedExperts(Tensor):
    """See the top of this file.

    Args:
        held: codes and scales of all experts.
        dtype: to be read in.
        expert: which one this is; None for all.
        transposed: rows and columns of each are exchanged.
    """

    held: Codes
    expert: int | None
    transposed: bool

    @staticmethod
    def __new__(
        cls, held: Codes, dtype: torch.dtype, expert: int | None = None, transposed: bool = False
    ) -> QuantizedExperts:
        """A tensor without memory of its own."""
        rows, columns = held.shape
        shape, strides = ([columns, rows], [1, columns]) if transposed else ([rows, columns], [columns, 1])
        if expert is None:
            shape, strides = [len(held.codes), *shape], [rows * columns, *strides]
        self: Any = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), strides=tuple(strides), dtype=dtype, device=held.codes.device, requires_grad=False
        )
        self.held, self.expert, self.transposed = held, expert, transposed
        return self

    def values(self) -> Tensor:
        """The tensor that it stands for."""
        return self._values_of_experts(range(self.shape[0])) if self.expert is None else self._matrix(self.expert)

    def _matrix(self, expert: int) -> Tensor:
        matrix = self.held.matrix(expert).to(self.dtype)
        return matrix.t() if self.transposed else matrix

    def _values_of_experts(self, experts: Any) -> Tensor:
        made = torch.empty(len(experts), *self.held.shape, dtype=self.dtype, device=self.device)
        for place, expert in zip(made, experts, strict=True):
            place.copy_(self.held.matrix(expert))
        return made.mT if self.transposed else made

    def _like(self, held: Codes | None = None, **other: Any) -> QuantizedExperts:
        mine = {"dtype": self.dtype, "expert": self.expert, "transposed": self.transposed}
        return QuantizedExperts(held or self.held, **{**mine, **other})

    def storage(self) -> Any:
        """There is none: what writes tensors to a file asks for it."""
        raise TypeError(
            f"experts that are held in {self.held.quant_type} are written to no file: merge into the base or into "
            "dequantized weights instead, as `lit-lora merge` does"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"QuantizedExperts({tuple(self.shape)}, {self.held.quant_type}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Names of the tensors inside, and what else to make it of: how torch knows to move it as a whole."""
        rest = {name: value for name, value in self.held._asdict().items() if not isinstance(value, Tensor)}
        return list(self.held.tensors), (rest, self.dtype, self.expert, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: Any, *_: Any) -> QuantizedExperts:
        """The reverse."""
        fields, dtype, expert, transposed = rest
        held: Any = {**fields, **inner}
        return QuantizedExperts(Codes(**held), dtype, expert, transposed)

    def __getattr__(self, name: str) -> Any:
        if name in Codes._fields:
            return getattr(self.held, name)
        raise AttributeError(name)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Views stay codes, all else is given values."""
        kwargs = kwargs or {}
        view = _VIEWS.get(func)
        if view is not None and isinstance(args[0], cls):
            result = view(args[0], *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable and _writes_to(cls, func, args):
            raise TypeError(f"{func} writes to experts that are held in {args[0].held.quant_type}: they are frozen")
        args, kwargs = tree_map_only(cls, lambda leaf: leaf.values(), (args, kwargs))
        return func(*args, **kwargs)


def _writes_to(cls: type, func: Any, args: Any) -> bool:
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    return any(isinstance(value, cls) for value, is_written in zip(args, written, strict=False) if is_written)


# --------------------------------------------------------------------------- views; NotImplemented for other arguments


def _select(tensor: QuantizedExperts, dim: int, index: int) -> Any:
    if tensor.expert is not None or dim % 3:
        return NotImplemented
    return tensor._like(expert=index % len(tensor))


def _transpose(tensor: QuantizedExperts, dim0: int, dim1: int) -> Any:
    last_two = {tensor.ndim - 2, tensor.ndim - 1}
    if {dim0 % tensor.ndim, dim1 % tensor.ndim} != last_two:
        return NotImplemented
    return tensor._like(transposed=not tensor.transposed)


def _pick(tensor: QuantizedExperts, indices: Any) -> Any:
    """By one index for each row: only experts that are picked are computed."""
    (index, *others) = indices
    if tensor.expert is not None or others or index is None or index.dtype is torch.bool or index.is_meta:
        return NotImplemented
    if type(index) is not Tensor:
        return NotImplemented
    picked, place = index.unique(return_inverse=True)
    return tensor._values_of_experts(picked.tolist())[place]


def _converted(tensor: QuantizedExperts, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    held = tensor.held if device is None else tensor.held.each(lambda part: part.to(device))
    return tensor._like(held, dtype=dtype or tensor.dtype)


_VIEWS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.detach.default: lambda tensor: tensor._like(),
    torch.ops.aten.alias.default: lambda tensor: tensor._like(),
    torch.ops.aten.clone.default: lambda tensor, **_: tensor._like(tensor.held.each(Tensor.clone)),
    torch.ops.aten._to_copy.default: _converted,
    torch.ops.aten.select.int: _select,
    torch.ops.aten.transpose.int: _transpose,
    torch.ops.aten.t.default: lambda tensor: _transpose(tensor, 0, 1) if tensor.ndim == 2 else NotImplemented,
    torch.ops.aten.index.Tensor: _pick,
}


# ------------------------------------------------------------------------------------------------ for other files


def quantized_experts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own parameters that are held so, by their names in it."""
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, QuantizedExperts):
            yield name, parameter


def tensors_in(leaves: Any) -> list[Any]:
    """Tensors with memory in a tree: of quantized experts what they hold."""
    return [
        part
        for leaf in tree_leaves(leaves)
        for part in (leaf.held.tensors.values() if isinstance(leaf, QuantizedExperts) else (leaf,))
    ]
