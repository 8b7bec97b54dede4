"""Every storage that a piece of code makes and drops, in order: what is alive at any moment, and where the peak is.

A ``TorchDispatchMode`` sees the tensors that operators return; a weak reference to each storage tells when it goes.
Views share a storage, so they cost nothing; what an autograd graph, an optimizer or a cache keeps is alive. It works
alike on real tensors, where it measures, and on fake ones, where it predicts (``traced_step.py``).

Left out: memory that an operator takes and gives back inside its kernel, which no tensor shows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_lora.base.quantized_experts import QuantizedExperts, tensors_in

WORKSPACE = "workspace"
"""Category of what nobody has claimed."""

GATHERED = "gathered"
"""Category of weights that are put together from the shares of several processes."""


class Event(NamedTuple):
    """A storage came or went."""

    key: int
    num_bytes: int
    """Negative when it went. What is gathered from several processes is given back and made again under one key."""
    phase: str
    where: str


@dataclass(frozen=True)
class Peak:
    """What is alive at the highest moment of a phase."""

    total: int
    """Bytes."""
    by_category: dict[str, int]
    """Bytes by category."""
    where: str
    """Module and operator that reached it."""


class StorageTracker(TorchDispatchMode):
    """Records storages while it is active.

    Args:
        model: names the place of a peak by this model's modules.
        outputs_only: leave out tensors from before that only come as inputs.
    """

    def __init__(self, model: nn.Module | None = None, *, outputs_only: bool = False) -> None:
        super().__init__()
        self._outputs_only = outputs_only
        self.events: list[Event] = []
        self.categories: dict[int, str] = {}
        self._live: dict[int, tuple[int, Any]] = {}
        self._elsewhere: set[int] = set()
        self._gathered: dict[int, int] = {}  # address of a storage that changes its size -> its last size
        self._num_seen = 0
        self._phase = ""
        self._modules: list[str] = []
        self._module_of_node: dict[int, str] = {}
        self._named: dict[nn.Module, str] = {}
        self._handles: list[Any] = []
        if model is not None:
            self.name_modules(model)

    def name_modules(self, model: nn.Module) -> None:
        """Name places by the modules of ``model``."""
        self._named = {module: name for name, module in model.named_modules()}

    # ------------------------------------------------------------------ recording

    def __enter__(self) -> StorageTracker:
        # For the whole process, since hooks on a module would keep it from its faster forward; all others pass through.
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator, and look at the storages of its result (and of its inputs, made before the tracker)."""
        if QuantizedExperts in types:
            return NotImplemented  # they make their values first, which is then seen here
        kwargs = kwargs or {}
        where = self._where(func)
        if not self._outputs_only:
            self.add(tree_leaves((args, kwargs)), where)
        result = func(*args, **kwargs)
        self.add(tree_leaves(result), where)
        if str(func).startswith("fsdp.split_with_sizes_copy"):
            self.follow(kwargs["out"])
        for address in list(self._gathered):
            self._compare_size(address, where)
        return result

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """These storages, which were seen, are weights in full while a layer runs, and empty between."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._gathered:
                self._gathered[storage._cdata] = storage.nbytes()
                self.categories[self._live[storage._cdata][0]] = GATHERED

    def _compare_size(self, address: int, where: str) -> None:
        key, storage = self._live[address]
        now = storage().nbytes()
        if now != self._gathered[address]:
            self.events.append(Event(key, now - self._gathered[address], self._phase, where))
            self._gathered[address] = now

    def add(self, leaves: Iterable[Any], where: str = "") -> None:
        """Record the storages of these tensors from now on."""
        for leaf in tensors_in(leaves):
            if not isinstance(leaf, Tensor) or leaf.device.type == "meta" or isinstance(leaf, DTensor):
                continue  # a DTensor's own storage has the size of the whole and no memory; its share is seen by itself
            storage = leaf.untyped_storage()
            if storage._cdata not in self._live:
                self._start(storage, where)

    def _start(self, storage: torch.UntypedStorage, where: str) -> None:
        address, num_bytes, key = storage._cdata, storage.nbytes(), self._num_seen
        self._num_seen += 1
        self._live[address] = (key, weakref.ref(storage, lambda _: self._end(address, key, num_bytes)))
        self.events.append(Event(key, num_bytes, self._phase, where))

    def _end(self, address: int, key: int, num_bytes: int) -> None:
        if self._live.get(address, (None,))[0] == key:
            del self._live[address]
            num_bytes = self._gathered.pop(address, num_bytes)
        if key in self._elsewhere:
            return
        self.events.append(Event(key, -num_bytes, self._phase, ""))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens within belongs to this phase. A phase may come several times."""
        previous, self._phase = self._phase, name
        # An empty event: the phase has a peak even if it makes nothing.
        self.events.append(Event(-1, 0, name, "start"))
        try:
            yield
        finally:
            self._phase = previous

    # ------------------------------------------------------------------ categories

    def claim(self, category: str, tensors: Iterable[Tensor] | None = None) -> None:
        """Put storages, or all that are alive and unclaimed, into a category, from their beginning."""
        if tensors is None:
            keys: Iterable[int] = [key for key, _ in self._live.values() if key not in self.categories]
        else:
            tensors = tensors_in(list(tensors))
            self.add(tensors)
            keys = [self._live[tensor.untyped_storage()._cdata][0] for tensor in tensors]
        for key in keys:
            self.categories[key] = category

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count these storages no more, as if they had never been made: they lie in another memory."""
        keys = {self._live[tensor.untyped_storage()._cdata][0] for tensor in tensors}
        self._elsewhere |= keys
        self.events = [event for event in self.events if event.key not in keys]

    def forget_the_dead(self) -> None:
        """Drop the history of what is gone already: as if only what is alive had ever been made."""
        alive = {key for key, _ in self._live.values()}
        sizes: dict[int, Event] = {}
        for event in self.events:
            if event.key in alive:
                before = sizes.get(event.key)
                sizes[event.key] = (
                    event if before is None else before._replace(num_bytes=before.num_bytes + event.num_bytes)
                )
        self.events = list(sizes.values())

    # ------------------------------------------------------------------ results

    def peak(self, phase: str | None = None) -> Peak:
        """The highest moment of a phase, or of all."""
        total, best, at = 0, -1, -1
        for index, event in enumerate(self.events):
            total += event.num_bytes
            if total > best and phase in (None, event.phase):
                best, at = total, index
        if at < 0:
            raise ValueError(f"nothing was recorded in phase {phase!r}")
        alive: dict[int, int] = {}
        for event in self.events[: at + 1]:
            alive[event.key] = alive.get(event.key, 0) + event.num_bytes
        by_category: dict[str, int] = {}
        for key, num_bytes in alive.items():
            category = self.categories.get(key, WORKSPACE)
            by_category[category] = by_category.get(category, 0) + num_bytes
        return Peak(best, by_category, self.events[at].where)

    @property
    def alive_bytes(self) -> int:
        """Bytes alive now."""
        return sum(event.num_bytes for event in self.events)

    # ------------------------------------------------------------------ names of places

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if module in self._named:
            self._modules.append(self._named[module])

    def _leave_module(self, module: nn.Module, *_: Any) -> None:
        if module in self._named and self._modules:
            self._modules.pop()

    def _where(self, func: Any) -> str:
        node = torch._C._current_autograd_node()
        if self._modules:
            module = self._modules[-1]
            # Nodes are numbered as they are made: the one of this operator has just got its number.
            self._module_of_node[torch._C._autograd._get_sequence_nr() - 1] = module
        elif node is not None:
            module = self._module_of_node.get(node._sequence_nr(), "")
        else:
            module = ""
        name = str(func).removeprefix("aten.").removesuffix(".default")
        return f"{name} in {module}" if module else name
