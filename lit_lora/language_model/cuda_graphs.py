"""The forward and backward pass of a training step on CUDA, recorded once a shape and then launched as a whole.

A small model's step is thousands of short kernels, and a host that launches them one by one takes longer than the
device computes. A CUDA graph holds them all. It is bound to addresses and sizes, so batches are brought to few shapes
(``fixed_shape.py``), gradients are added up in tensors that stay, and all graphs share one pool of memory: what one
leaves there the next may overwrite, since a loss is followed by its backward pass before the next one begins. Where it
is not, the second one is computed without a graph.

The first two batches are computed without one: kernels are compiled and libraries prepared then. A model that cannot
be recorded trains without, and the run says why.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from lit_lora.batch import Batch
from lit_lora.config import StepConfig
from lit_lora.language_model.attention import CannotPack
from lit_lora.language_model.fixed_shape import FixedBatch, Shape, shape_for
from lit_lora.language_model.forward import ForwardPath, language_model_loss

_PREPARING = 2
"""Batches that are computed before the first recording."""

MOST_GRAPHS = 48
"""Each holds some megabytes of the device; a batch of yet another shape is computed without."""

MOST_RECOMPUTED_TOKENS = 8192
"""Of a batch whose layers are recomputed: a longer one keeps the device busy by itself, and its shape has to fit."""


def why_not(step: StepConfig, path: ForwardPath) -> str:
    """Why no step is recorded with these settings; empty if it can be tried."""
    if not step.cuda_graphs:
        return "switched off"
    if not path.packed:
        return "not for padded batches"
    if not path.direct_head:
        return "not for a loss from the model's own logits"
    if step.recompute and step.cuda_graphs == "auto":
        return "they take memory, and recomputed layers save it; model.step.cuda_graphs true records these, too"
    return "not with compiled layers" if step.compile_layers else ""


def is_recorded(step: StepConfig, batch: Batch) -> bool:
    """Whether a batch is small enough to be rounded up and recorded, where steps are."""
    return not step.recompute or batch["input_ids"].numel() <= MOST_RECOMPUTED_TOKENS


def graphs_for(
    model: PreTrainedModel, step: StepConfig, path: ForwardPath, parameters: Sequence[nn.Parameter]
) -> CudaGraphs | None:
    """:class:`CudaGraphs` where they can be tried; the run is told why they are not."""
    reason = why_not(step, path)
    if not reason and torch.are_deterministic_algorithms_enabled():
        # A resumed run computes its first batches without graphs, and two kernels for the same need not round alike.
        reason = "not with trainer.deterministic, so that a resumed run repeats every bit"
    rank_zero_info(f"CUDA graphs: {reason or 'forward and backward pass are recorded'}")
    return None if reason else CudaGraphs(model, step, path, parameters)


class _Recorded(NamedTuple):
    """The step of one shape."""

    batch: FixedBatch
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    nll_sum: Tensor


class CudaGraphs:
    """Computes losses of training batches by graphs, and records these as shapes come.

    Args:
        model: the causal language model, in training mode, on CUDA.
        step: how its steps are run.
        path: how its batches are run.
        parameters: all that train.
    """

    def __init__(
        self, model: PreTrainedModel, step: StepConfig, path: ForwardPath, parameters: Sequence[nn.Parameter]
    ) -> None:
        self._model, self._step, self._path, self._parameters = model, step, path, list(parameters)
        self._device = self._parameters[0].device
        self._addresses = self._where()
        self._num_prepared = 0
        self._recorded: dict[Shape, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)
        self._factor = torch.ones((), device=self._device)
        """Gradient of the loss that is passed on: a constant of the trainer's, or a loss scale."""
        self._gradients: list[Tensor] = []
        """Of all parameters, outside of the pool: what is added up there outlives a step."""
        self._reached: set[int] = set()
        """Positions of the parameters that the loss depends on."""
        self._open: weakref.ref[_Ticket] | None = None
        self.failed = ""
        """Why nothing is recorded any more; empty while it is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the module has tensors elsewhere, and no graphs."""

    def nll_sum(self, batch: Batch) -> Tensor:
        """Sum of the negative log-likelihoods of a batch, as ``language_model_loss`` gives it."""
        limit = self._path.packed_up_to
        if self.failed or "seq_lens" not in batch or (limit is not None and max(batch["seq_lens"]) > limit):
            return self._plain(batch)
        if not is_recorded(self._step, batch):
            return self._plain(batch)
        shape = shape_for(batch)
        if self._where() != self._addresses:
            self._drop("the parameters have moved to other memory")
        elif self._num_prepared >= _PREPARING and not self._is_open and self._has(shape):
            recorded = self._recorded[shape]
            recorded.batch.filled(batch)
            ticket = _Ticket()
            self._open = weakref.ref(ticket)
            return _Replay.apply(self._parameters[0], self, recorded, ticket)
        return self._plain(batch) if self.failed else self._prepared(shape, batch)

    def _prepared(self, shape: Shape, batch: Batch) -> Tensor:
        """As a recorded step computes it, launch by launch."""
        self._num_prepared += 1
        on_cpu, on_cuda = torch.get_rng_state(), self._offset
        try:
            nll_sum = self._plain(FixedBatch(shape, self._device).filled(batch))
        except CannotPack as error:
            self._drop(str(error))
        if self.failed:  # beyond the handler: with the error goes what an interrupted torch.utils.checkpoint has left
            return self._plain(batch)
        if not torch.equal(torch.get_rng_state(), on_cpu):
            self._drop("the forward pass draws random numbers on the CPU")
        elif self._step.recompute and self._offset != on_cuda:
            self._drop("dropout in recomputed layers")
        return nll_sum

    def _plain(self, batch: Batch) -> Tensor:
        return language_model_loss(self._model, batch, self._path).nll_sum

    @property
    def _offset(self) -> int:
        """How many random numbers the device has drawn, in multiples of a block of them."""
        return torch.cuda.default_generators[self._device.index].get_offset()

    @property
    def _is_open(self) -> bool:
        """Whether a loss still waits for its backward pass, which needs what lies in the pool."""
        return self._open is not None and self._open() is not None

    def _where(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def _has(self, shape: Shape) -> bool:
        """Whether the step of a shape is recorded, after recording it if need be."""
        if shape in self._recorded:
            return True
        if len(self._recorded) >= MOST_GRAPHS:
            return False
        if not self._recorded:
            gc.collect()
            torch.cuda.empty_cache()  # what the first batches left is of no use to the pool
        try:
            self._recorded[shape] = self._record(shape)
        except torch.OutOfMemoryError:
            self._drop("memory ran out")
        except (RuntimeError, CannotPack) as error:
            self._drop(str(error).strip().splitlines()[0])
        return shape in self._recorded

    def _record(self, shape: Shape) -> _Recorded:
        batch, forward, backward = FixedBatch(shape, self._device), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self._gradients = self._gradients or [torch.zeros_like(parameter) for parameter in self._parameters]
        torch.cuda.synchronize(self._device)
        with (
            _undisturbed(self._device),
            torch.cuda.stream(self._stream),
            _stand_ins(self._model, self._parameters) as stand_ins,
        ):
            with _recording(forward, self._pool):
                nll_sum = self._plain(batch.batch)
            with _recording(backward, self._pool):
                wanted = [*stand_ins, *self._parameters]
                gradients = torch.autograd.grad(nll_sum, wanted, self._factor, allow_unused=True)
                if any(gradient is not None for gradient in gradients[len(stand_ins) :]):
                    raise RuntimeError("a parameter is read from beside its module")
                self._add_gradients(gradients[: len(stand_ins)])
        return _Recorded(batch, forward, backward, nll_sum.detach())

    def _add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        found = {place: gradient for place, gradient in enumerate(gradients) if gradient is not None}
        self._reached |= found.keys()
        torch._foreach_add_([self._gradients[place] for place in found], list(found.values()))

    def backward(self, recorded: _Recorded, factor: Tensor) -> None:
        """Add ``factor`` times the loss's gradients to those of the parameters."""
        self._factor.copy_(factor)
        empty = []
        for place in self._reached:
            parameter, kept = self._parameters[place], self._gradients[place]
            if parameter.grad is None:
                empty.append(kept)
            elif parameter.grad is not kept:
                kept.copy_(parameter.grad)
            parameter.grad = kept
        if empty:
            torch._foreach_zero_(empty)
        recorded.backward.replay()

    def _drop(self, reason: str) -> None:
        self.failed = reason
        self._recorded.clear()
        torch.cuda.empty_cache()
        rank_zero_info(f"CUDA graphs: none from here on ({reason})")


@contextmanager
def _stand_ins(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within, the model has other parameters on the same memory, for autograd knows nothing of them yet.

    A parameter's gradient is handed over on the stream that first used the parameter, for as long as any loss of it is
    kept, and a recording must not touch another stream.
    """
    instead = {id(parameter): nn.Parameter(parameter.detach()) for parameter in parameters}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in instead
    ]
    try:
        for module, name, parameter in places:
            setattr(module, name, instead[id(parameter)])
        yield list(instead.values())
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Within, what is recorded depends on nothing from outside, and an error leaves nothing behind."""
    generator = torch.cuda.default_generators[device.index]
    before = generator.clone_state()  # one that a failed recording leaves draws no more numbers
    collects, caches = gc.isenabled(), torch.is_autocast_cache_enabled()
    gc.disable()  # what it frees may not be freed while a stream records
    torch.set_autocast_cache_enabled(False)  # what was cast before is cast once more, by the graph
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(before)
        raise
    finally:
        torch.set_autocast_cache_enabled(caches)
        if collects:
            gc.enable()


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Within, what the current stream is given goes to the graph, and is not run."""
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # that it failed is said better by what it failed of
            graph.capture_end()
        raise
    graph.capture_end()


class _Ticket:
    """There as long as the loss that it belongs to waits for its backward pass."""


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, graphs: CudaGraphs, recorded: _Recorded, ticket: _Ticket) -> Tensor:
        recorded.forward.replay()
        ctx.graphs, ctx.recorded, ctx.ticket = graphs, recorded, ticket
        return recorded.nll_sum.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[None, ...]:
        if ctx.ticket is None:
            raise RuntimeError(
                "backward through the same loss a second time: with step.cuda_graphs its activations are gone then. "
                "Add up what is to be differentiated, or set step.cuda_graphs to false"
            )
        ctx.ticket = None
        ctx.graphs.backward(ctx.recorded, factor)
        return None, None, None, None
