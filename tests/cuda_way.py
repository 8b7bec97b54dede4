"""Where the code for CUDA is tested: on a CPU, asked to take that way, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from lit_lora.kernels.cuda_way import as_on_cuda

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def cuda_way(device: str) -> Iterator[None]:
    """Within, the code for CUDA runs on tensors of this device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    with as_on_cuda() if device == "cpu" else nullcontext():
        yield
