"""Regional compilation: each decoder layer through ``torch.compile``, one compiled code for all layers that are alike.

Sizes are dynamic, so that batches of other lengths do not compile again. Attention over a packed batch stays outside
(``attention.py``), which splits a layer into four compiled pieces. A layer whose input needs no gradient (the first),
one whose input does, and evaluation each have their own: so many compilations there are, and no more. torch keeps
the code on disk for the next run, which then waits half as long.

On a CPU it is no faster (``benchmarks/NOTES.md``), since products and attention take most of a step. It is meant for
CUDA; on an H200 a 135M model gained nothing, and its first steps took 67 s.

A call with a key-value cache (generation) runs the layer as it was. Left out: the head, whose loss is computed in
chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import calculate_time_spent
from torch._inductor.runtime.cache_dir_utils import cache_dir
from transformers import Cache

from lit_lora.base import base_weight
from lit_lora.base.repeated_layers import repeated_layers


def check_compiler(device: torch.device) -> None:
    """Compile something small for ``device``, before anything large is loaded.

    Raises:
        ValueError: if that fails, as without a C++ compiler (CPU) or Triton (CUDA).
    """
    try:
        torch.compile(_trial)(torch.zeros(8, device=device))
    except TorchDynamoException as error:
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler (g++ or clang, or $CXX)"
        raise ValueError(
            f"compile_layers needs {needed}, and torch.compile does not work here on {device.type}: "
            f"{str(error).splitlines()[0]}. Install it, or set compile_layers to false"
        ) from error


def compile_layers(model: nn.Module) -> CompileClock:
    """Let the layers of ``model`` run compiled; parameters keep their names.

    To be called before ``checkpoint_layers``: what is recomputed is then the compiled layer. Quantized weights become
    plain parameters: bitsandbytes' own are no inputs that the compiler can take.

    Raises:
        ValueError: if the model has no list of layers.
    """
    layers = repeated_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no list of equal layers to compile: set compile_layers to false")
    for layer in layers:
        for module in layer.modules():
            base_weight.hold_plainly_(module)
        layer.forward = _CompiledForward(layer.forward)
    return CompileClock()


class CompileClock:
    """Tells how long compiling took, each time that there was some."""

    def __init__(self) -> None:
        self._reported_s = _compile_time_s()

    def report(self) -> None:
        """After a step."""
        total_s = _compile_time_s()
        if total_s > self._reported_s:
            rank_zero_info(
                f"Compiled layers in {total_s - self._reported_s:.1f} s; kept in {cache_dir()} for later runs"
            )
            self._reported_s = total_s


class _CompiledForward:
    def __init__(self, forward: Any) -> None:
        self._eager = forward
        self._compiled = torch.compile(forward, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return self._eager(*args, **kwargs)
        return self._compiled(*args, **kwargs)


def _compile_time_s() -> float:
    return calculate_time_spent().get("total_wall_time", 0.0)


def _trial(x: Tensor) -> Tensor:
    return x * 2 + 1
