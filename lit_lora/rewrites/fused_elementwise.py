"""Norms and rotary positions of a model through one kernel each (``kernels/elementwise.py``).

Nothing is looked up by a model's name. A norm is taken if its own forward, on rows of several magnitudes, is the
formula of RMSNorm; rotary positions if the function that an attention calls for them is their formula. Both are
replaced in this model alone: the forward of an attention is run with another function under that name, and
transformers' module stays as it is.

What the kernels do not serve (another type or layout, a norm that is trained, a graph that torch.compile takes) goes
the model's own way, call by call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lit_lora.base.whose_error import ask, raised_here
from lit_lora.kernels import elementwise

_ROTARY = "apply_rotary_pos_emb"
"""What transformers calls the function, in every file that has one of this kind."""

Rotary = Callable[..., tuple[Tensor, Tensor]]


def fuse_elementwise(model: nn.Module, *, norms_too: bool = True) -> tuple[int, int]:
    """Give the norms and the rotary positions of ``model`` kernels of their own, where these compute the same.

    Args:
        model: is changed.
        norms_too: False to change rotary positions alone: float32 on a CPU has no kernel for norms.

    Returns:
        How many norms, and how many attentions, were changed.
    """
    norms = [module for module in model.modules() if norms_too and _is_rms_norm(module)]
    for module in norms:
        module.forward = MethodType(_norm, module)
    attentions = [(module, made) for module in model.modules() if (made := _with_kernel(type(module))) is not None]
    attentions = [(module, made) for module, made in attentions if "forward" not in vars(module)]
    for module, made in attentions:
        module.forward = MethodType(made, module)
    return len(norms), len(attentions)


def _norm(module: Any, x: Tensor, *others: Any, **named: Any) -> Tensor:
    weight = module.weight
    served = elementwise.serves(x) and x.dtype == weight.dtype and not weight.requires_grad
    if not served or others or named or torch.compiler.is_compiling():  # others, as the gate of Mamba's
        return type(module).forward(module, x, *others, **named)
    return elementwise.rms_norm(x, weight, _epsilon(module))


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    names = [name for name, _ in module.named_parameters()]
    plain = names == ["weight"] and module.weight.ndim == 1 and not list(module.buffers())
    if not plain or "forward" in vars(module) or not isinstance(eps := _epsilon(module), float):
        return False
    with _disable_current_modes():  # a trial needs values, also where the model has none
        weight = torch.linspace(0.5, 2, len(module.weight), device="cpu")
        # The smallest rows show where epsilon goes in.
        magnitudes = torch.tensor([[1e-4], [1.0], [1e3]], device="cpu")
        x = torch.linspace(-1, 2, 3 * len(weight), device="cpu").view(3, -1) * magnitudes
        expected = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        stand_in = object.__new__(type(module))
        # Whatever else it has a name for is no parameter.
        of_trial = module._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
        vars(stand_in).update(vars(module), _parameters=of_trial)
        try:
            got = ask(type(module).forward, stand_in, x)
        except Exception as error:
            if raised_here(error):
                raise
            return False  # it takes something else
        same = isinstance(got, Tensor) and got.shape == expected.shape and got.dtype == expected.dtype
        return same and torch.allclose(got, expected, rtol=1e-5, atol=0)


def _with_kernel(kind: type) -> FunctionType | None:
    """The forward of a class with rotary positions by our kernel; None where it has none of that formula."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(_ROTARY)
    if own is None or not _is_rotation(own):
        return None
    names = {**forward.__globals__, _ROTARY: _rotation(own)}
    made = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _rotation(own: Rotary) -> Rotary:
    def apply_rotary_pos_emb(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ours = len(args) == 4 and not kwargs and elementwise.serves_positions(args[0])
        if ours and not torch.compiler.is_compiling() and _fits(*args):
            return elementwise.rotate(*args)
        return own(*args, **kwargs)

    return apply_rotary_pos_emb


def _fits(query: Any, key: Any, cos: Any, sin: Any) -> bool:
    tensors = (query, key, cos, sin)
    if not all(isinstance(x, Tensor) and x.dtype == query.dtype and x.shape[-1] == query.shape[-1] for x in tensors):
        return False
    rows = (query.shape[0], query.shape[2])
    return (
        query.ndim == key.ndim == 4
        and cos.ndim == sin.ndim == 3
        and (key.shape[0], key.shape[2]) == rows
        and cos.shape == sin.shape
        and cos.shape[0] in (1, rows[0])
        and cos.shape[1] == rows[1]
        and not (cos.requires_grad or sin.requires_grad)
    )


@torch.no_grad()
def _is_rotation(own: Rotary) -> bool:
    with _disable_current_modes():
        generator = torch.Generator("cpu").manual_seed(0)
        query, key = (torch.randn(2, n, 5, 8, device="cpu", dtype=torch.float64, generator=generator) for n in (3, 1))
        cos, sin = (torch.randn(2, 5, 8, device="cpu", dtype=torch.float64, generator=generator) for _ in range(2))
        expected = elementwise.rotate(query, key, cos, sin)
        try:
            got = ask(own, query, key, cos, sin)
        except Exception as error:
            if raised_here(error):
                raise
            return False  # it takes something else
        return (
            isinstance(got, tuple)
            and len(got) == 2
            and all(
                isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6)
                for a, b in zip(got, expected, strict=True)
            )
        )
