"""Where CUDA and a CPU are best served by different code: which of the two runs.

The device of a tensor decides, or the one that it stands for (a memory trace). A test of the CUDA code asks for it on
the CPU with :func:`as_on_cuda`; it then runs with torch's operators in the place of what only CUDA has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lit_lora.kernels.cuda_stand_ins import is_on_cuda

HALF = (torch.float16, torch.bfloat16)

_asked_for = False


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Within, tensors on a CPU are computed with as if they were on CUDA."""
    global _asked_for
    before, _asked_for = _asked_for, True
    try:
        yield
    finally:
        _asked_for = before


def takes_cuda_way(x: Tensor) -> bool:
    """Whether what is computed from ``x`` is computed as on CUDA."""
    return _asked_for or is_on_cuda(x)


def computes_half(x: Tensor) -> bool:
    """Whether half precision on the device of ``x`` is computed by functions of this package: on CUDA, and on a CPU."""
    return takes_cuda_way(x) or x.device.type == "cpu"


def has_no_values(x: Tensor) -> bool:
    """Whether ``x`` only has a shape: what a kernel of ours would allocate is then all that counts."""
    return isinstance(x, FakeTensor)


def sums_in_float32(x: Tensor) -> bool:
    """Whether a product of half-precision tensors can be had in float32, without rounding it on the way."""
    return x.dtype in HALF and (x.is_cuda or has_no_values(x))


def runs_triton(x: Tensor) -> bool:
    """Whether a kernel written in Triton can take ``x``; a graph that is compiled fuses operators itself."""
    return x.is_cuda and not has_no_values(x) and not torch.compiler.is_compiling() and _triton_is_installed()


@torch.compiler.assume_constant_result
@cache  # this is asked at each launch
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
