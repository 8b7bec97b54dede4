"""Tensors without values on a CPU that stand for tensors on CUDA, so that code which asks for the device takes its way.

What decides is the tensor itself, by the mode that made it: nothing is replaced, and other tensors, of other threads
too, are computed as ever.
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


class CudaStandIns(FakeTensorMode):
    """Within, tensors that are made on a CPU have no values and stand for tensors on CUDA."""


def is_on_cuda(tensor: Tensor) -> bool:
    """Whether the tensor is on CUDA, or stands for one that is."""
    return tensor.is_cuda or (isinstance(tensor, FakeTensor) and isinstance(tensor.fake_mode, CudaStandIns))
