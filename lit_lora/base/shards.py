"""A frozen base that is divided among processes: each holds its share of every weight, and the whole of none.

torch's ``fully_shard`` does the work (FSDP2). A decoder layer's weights are gathered while the layer runs, and dropped
after it; what lies outside of the layers (embedding, last norm, head) while the model runs. What trains is left whole
in every process: adapters are small, and stay what callbacks, optimizers and checkpoints take them for.

``fully_shard`` takes a layer of which this process has all weights, or none. While a model is loaded it is given none:
each module is cut down to this process's rows as soon as it has its values, and the rows go into the layer afterwards.

Shares may lie in the memory of the host while nobody computes with them (``CPUOffloadPolicy``). What trains, buffers,
and what a quantized layer holds beside its parameters stay on the device: they are small.

A weight that is not gathered has no values to compute with. Whoever needs those without calling the model itself does
so within :func:`in_one_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from lit_lora.base.base_weight import hold_plainly_, state_tensors
from lit_lora.base.quantized_experts import tensors_in
from lit_lora.base.repeated_layers import repeated_layers

T = TypeVar("T")
_PASS = "lit_lora_pass"
"""Attribute of a sharded model: runs a function as if it were the model's forward pass."""
_ROWS = "lit_lora_rows"
"""Attribute of a parameter on the meta device: this process's rows of it."""


@dataclass(frozen=True)
class Sharding:
    """Among which processes a base is divided."""

    mesh: DeviceMesh
    """One-dimensional."""
    offload: CPUOffloadPolicy | None = None
    """With it, shares lie in the memory of the host, and go to the device to be gathered."""

    def cut_(self, module: nn.Module, device: torch.device, dtypes: Mapping[str, torch.dtype]) -> None:
        """Keep this process's rows of a module's own weights, in place, until :meth:`shard_layer_` of its layer.

        Args:
            module: with values on any device; it cannot be called until then.
            device: where the rows are to be, but for those that are offloaded.
            dtypes: what to convert parameters to, by their names.
        """
        hold_plainly_(module)
        for name, parameter in module.named_parameters(recurse=False):
            dtype, frozen = dtypes.get(name, parameter.dtype), parameter.detach()
            if frozen.is_meta:  # tied to another module's, which is found there
                continue
            if parameter.ndim:
                rows = self._rows_of(frozen).to("cpu" if self.offload else device, dtype, copy=True)
                kept = _cut(torch.empty_like(frozen, dtype=dtype, device="meta"), rows)
            else:
                kept = nn.Parameter(frozen.to(device, dtype), requires_grad=False)
            module.register_parameter(name, kept)

    def join_(self, module: nn.Module) -> bool:
        """Give a module that was cut its whole weights again, until it is cut again; every process must.

        Returns:
            Whether it was cut.
        """
        cut = {n: p for n, p in module.named_parameters(recurse=False) if hasattr(p, _ROWS)}
        for name, parameter in cut.items():
            module.register_parameter(name, nn.Parameter(whole(self._share(parameter).detach()), requires_grad=False))
        return bool(cut)

    def _rows_of(self, tensor: Tensor) -> Tensor:
        parts, rank = tensor.chunk(self.mesh.size()), self.mesh.get_local_rank()
        return parts[rank] if rank < len(parts) else tensor[:0]

    def shard_layer_(self, layer: nn.Module) -> None:
        """Keep this process's share of a layer's frozen weights, in place; modules may have been cut before."""
        for module in layer.modules():
            hold_plainly_(module)
        cut = [
            (module, name, parameter)
            for module in layer.modules()
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if hasattr(parameter, _ROWS)
        ]
        kept_whole = {p for p in layer.parameters() if not isinstance(p, DTensor) and (p.requires_grad or not p.ndim)}
        if any(not p.is_floating_point() for p in layer.parameters() if p not in kept_whole):
            check_takes_codes()
        policy = self.offload or OffloadPolicy()
        # Also of the outermost part: an evaluation has no backward pass that would drop what is gathered.
        fully_shard(layer, mesh=self.mesh, reshard_after_forward=True, ignored_params=kept_whole, offload_policy=policy)
        share_of = {parameter: self._share(parameter) for _, _, parameter in cut}  # a tied weight has one
        for module, name, parameter in cut:
            module.register_parameter(name, share_of[parameter])

    def _share(self, cut: nn.Parameter) -> nn.Parameter:
        share: Any = DTensor.from_local(
            getattr(cut, _ROWS), self.mesh, [Shard(0)], run_check=False, shape=cut.shape, stride=cut.stride()
        )
        if self.offload:
            share = share.cpu()  # which torch pins before the first pass
        return nn.Parameter(share, requires_grad=False)

    def shard_(self, model: nn.Module) -> None:
        """Keep this process's share of every frozen weight of ``model``, in place; layers may have been done before."""
        for layer in repeated_layers(model):
            if not isinstance(layer, FSDPModule):
                self.shard_layer_(layer)
        self.shard_layer_(model)
        setattr(model, _PASS, _run)
        register_fsdp_forward_method(model, _PASS)


def takes_codes() -> bool:
    """Whether this torch divides weights that are no floating-point numbers, as those of a quantized base are.

    Before 2.12 it asks for their gradients: https://github.com/pytorch/pytorch/issues/177844.
    """
    return torch.torch_version.TorchVersion(torch.__version__) >= "2.12"


def check_takes_codes() -> None:
    """Refuse to divide a quantized base with a torch that cannot.

    Raises:
        ValueError: naming the version that can.
    """
    if not takes_codes():
        raise ValueError(
            f"a quantized base cannot be divided among processes by torch {torch.__version__}, whose fully_shard takes "
            "floating-point weights alone: it needs torch 2.12 or newer. Leave the quantization out, or the dividing"
        )


def _run(function: Callable[[], T]) -> T:
    return function()


def _cut(valueless: Tensor, rows: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(valueless, requires_grad=False)
    setattr(parameter, _ROWS, rows)
    return parameter


def made_of_rows(weight: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]]) -> list[nn.Parameter]:
    """What a function of rows makes of a frozen matrix, with a row for each of its rows; of a cut one, cut as well."""
    rows = getattr(weight, _ROWS, None)
    if rows is None:
        return [nn.Parameter(made, requires_grad=False) for made in function(weight)]
    made_of_share = function(rows)
    return [_cut(torch.empty(len(weight), *m.shape[1:], dtype=m.dtype, device="meta"), m) for m in made_of_share]


def is_sharded(model: nn.Module) -> bool:
    """Whether the base of ``model`` is divided among processes."""
    return isinstance(model, FSDPModule)


def in_one_pass(model: nn.Module, function: Callable[[], T]) -> T:
    """``function()``, within which parts of a sharded model can be called on their own, as within its forward pass."""
    run = vars(model).get(_PASS)
    result: T = function() if run is None else run(function)
    return result


def gathered_modules(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """The modules of ``model`` that are wanted, each with all of its weights as long as the caller looks at it."""
    if not is_sharded(model):
        yield from filter(wanted, model.modules())
        return
    in_one_pass(model, lambda: None)  # the first pass tells the parts whose they are
    seen: set[int] = set()
    for part in reversed([module for module in model.modules() if isinstance(module, FSDPModule)]):
        own = [module for module in part.modules() if id(module) not in seen]
        seen |= {id(module) for module in own}
        if not (found := list(filter(wanted, own))):
            continue
        part.unshard()
        try:
            yield from found
        finally:
            part.reshard()


def recover_(model: nn.Module) -> None:
    """After an exception within a sharded model: drop what is gathered, so that it can be run again."""
    if not isinstance(model, FSDPModule):
        return
    if hasattr(FSDPModule, "reset_iter_state"):
        model.reset_iter_state()
        return
    for part in model.modules():  # torch before 2.13
        if isinstance(part, FSDPModule):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process may have its share, on its device; every process must ask."""
    if not isinstance(tensor, DTensor):
        return tensor
    on_device: Any = tensor.to(device_of(tensor))
    return on_device.full_tensor()


def is_share(tensor: Tensor) -> bool:
    """Whether this is a process's share of a tensor, which tells where it is and how large, and has no values now."""
    return isinstance(tensor, DTensor)


def set_row_(weight: Tensor, row: int, values: Tensor) -> None:
    """Give a row of a frozen weight other values, which may be divided; every process must."""
    if not isinstance(weight, DTensor):
        weight[row] = values
        return
    share, a_share = weight.to_local(), -(-len(weight) // weight.device_mesh.size())
    row -= weight.device_mesh.get_local_rank() * a_share
    if 0 <= row < len(share):
        share[row] = values


@contextmanager
def weights_whole(part: nn.Module) -> Iterator[None]:
    """Within, a part of a model that is divided has whole weights, of which it is asked for values; all must ask."""
    held = [
        (module, name, parameter)
        for module in part.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for module, name, parameter in held:
        module.register_parameter(name, nn.Parameter(whole(parameter.detach()), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in held:
            module.register_parameter(name, parameter)


def device_of(weight: Tensor) -> torch.device:
    """Where a weight is computed with: of one whose share lies in the memory of the host, the process's device."""
    kind = weight.device_mesh.device_type if isinstance(weight, DTensor) else weight.device.type
    if kind == weight.device.type:
        return weight.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def device_of_model(model: nn.Module) -> torch.device:
    """Where a model computes, as far as its first weight tells."""
    return device_of(next(model.parameters()))


def shares(model: nn.Module) -> list[Tensor]:
    """This process's shares of what is divided."""
    return [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]


def held_bytes(model: nn.Module) -> int:
    """Bytes of the frozen weights, scales included, that this process holds."""
    frozen = {tensor.untyped_storage().data_ptr(): tensor for tensor in held_tensors(model, trained=False)}
    return sum(tensor.untyped_storage().nbytes() for tensor in frozen.values())


def held_tensors(model: nn.Module, *, trained: bool = True) -> Iterator[Tensor]:
    """What this process holds of a model: its shares of weights and scales, buffers, and if asked what trains."""
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if trained or not p.requires_grad]
        buffers = list(module.buffers(recurse=False)) if trained else []
        for tensor in tensors_in((*own, *state_tensors(module), *buffers)):
            yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def agreed(model: nn.Module, reason: str) -> str:
    """What all processes of a sharded model go by: the first reason that one of them has against something.

    They must run the model alike, since each run gathers weights from all of them.

    Args:
        model: sharded or not.
        reason: empty for none.
    """
    if not is_sharded(model):
        return reason
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, reason)
    return next(filter(None, found), "")
