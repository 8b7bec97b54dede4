"""Run a model on tensors that have shapes and no values: nothing is computed, nothing allocated.

torch's fake tensors, and what they lack for the models at hand. The product of a mixture of experts, one matrix a group
of rows, has no fake version in float32; one matrix for all rows needs the same memory and stands in for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from lit_lora.base.whose_error import described, place, raised_here
from lit_lora.kernels.cuda_stand_ins import CudaStandIns


@contextmanager
def without_values(purpose: str, *, as_on_cuda: bool = False) -> Iterator[FakeTensorMode]:
    """Tensors that this thread makes within have no values.

    Args:
        purpose: for the error: what is not possible with a model that cannot run so, and what to do.
        as_on_cuda: let them stand for tensors on CUDA where our code asks for the device.

    Raises:
        ValueError: if the model asks for a value, or for an operation that exists for real tensors only.
    """
    kind = CudaStandIns if as_on_cuda else FakeTensorMode
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log = logging.getLogger("torch._subclasses.fake_tensor")  # prints a traceback of its own
    log.addFilter(of_others)
    try:
        with kind(allow_non_fake_inputs=True) as mode, _GroupedProducts():
            yield mode
    except Exception as error:
        if raised_here(error):
            raise
        raise ValueError(
            f"the model does not run on tensors without values ({described(error)}, in {place(error)}): {purpose}"
        ) from error
    finally:
        log.removeFilter(of_others)


class _GroupedProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func == torch._grouped_mm and args[0].dtype is not torch.bfloat16:
            rows_SI, weights_EIO = args[:2]
            return rows_SI @ weights_EIO[0]
        return func(*args, **kwargs)
