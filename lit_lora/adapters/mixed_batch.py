"""Rows of one batch with different adapters: each row is computed with the one that it names.

Within :func:`mixed_adapters`, in each place where one of the adapters changes something stands a :class:`MixedRows`,
which gives each adapter its rows and puts the outputs back in order. A row is computed once, by whatever computes that
adapter when it is alone, so that all kinds of adapters can be mixed whose layers see rows; an adapter of fused experts
sees tokens, and biases belong to all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.adapters.named_adapters import (
    Adapter,
    active_adapters,
    adapters_of,
    check_names,
    put_in,
    set_adapter,
    take_out,
)


class _Rows:
    """Which rows of the inputs belong to which adapter; tells the layers of a model in its forward."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        self.sizes: tuple[int, ...] = ()
        """What the first dimension of a layer's input can be: rows, or tokens of all rows."""

    def before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the batch of a model; beams and repeated answers of a row follow each other.

        Raises:
            ValueError: if the batch has another number of rows.
        """
        inputs = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim >= 2), None)
        if inputs is None:
            raise ValueError("a batch with an adapter for each row needs a tensor with rows as its input")
        rows = len(inputs)
        if rows % len(self.names):
            raise ValueError(f"{len(self.names)} adapters are named, one for each row, and the batch has {rows} rows")
        self.sizes = (rows, rows * inputs.shape[1])

    def indices(self, x: Tensor) -> dict[str | None, Tensor]:
        """Adapter -> its rows of a layer's input."""
        if len(x) not in self.sizes:
            raise ValueError(
                f"a layer with adapters sees {len(x)} rows, and the batch has {self.sizes[0]}: its model takes rows "
                "apart (experts, for one), so that adapters cannot be mixed within a batch"
            )
        repeated = len(x) // len(self.names)
        found: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault(name, []).extend(range(row * repeated, (row + 1) * repeated))
        return {name: torch.tensor(rows, device=x.device) for name, rows in found.items()}


class MixedRows(nn.Module):
    """In the place of a layer: each row goes through the wrapper of its adapter, or the layer itself."""

    def __init__(self, base_layer: nn.Module, wrappers: dict[str, nn.Module], rows: _Rows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.wrappers = nn.ModuleDict({f"adapter_{number}": w for number, w in enumerate(wrappers.values())})
        self._by_name = {name: f"adapter_{number}" for number, name in enumerate(wrappers)}
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """What the layer returns, row by row."""
        by_module: dict[str | None, list[Tensor]] = {}
        for name, rows in self._rows.indices(x).items():
            by_module.setdefault(None if name is None else self._by_name.get(name), []).append(rows)
        parts = {key: torch.cat(rows) for key, rows in by_module.items()}
        outputs = [(self.base_layer if key is None else self.wrappers[key])(x[rows]) for key, rows in parts.items()]
        order = torch.cat(list(parts.values())).argsort()
        return torch.cat(outputs)[order]

    def __getattr__(self, name: str) -> Any:
        # A model may read any attribute of a layer that it owns.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "wrappers"):
                raise
            return getattr(self.base_layer, name)


@contextmanager
def mixed_adapters(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the context, each row of a batch is computed with an adapter of its own: forward, and ``generate``.

    Example::

        with mixed_adapters(model, ["french", "poems", None]):
            model.generate(**three_prompts)

    Args:
        model: with adapters.
        names: the adapter of each row; None for the base alone.

    Raises:
        ValueError: if there is none of a name, or one cannot be mixed with others.
    """
    if not names:
        raise ValueError("name an adapter, or None, for each row of the batch")
    wanted = list(dict.fromkeys(name for name in names if name is not None))
    check_names(model, wanted)
    before = take_out(model)
    rows = _Rows(names)
    placed: dict[tuple[int, str], list[Any]] = {}
    try:
        for name, adapter in adapters_of(model, wanted).items():
            if why := _why_alone(adapter):
                raise ValueError(f"adapter {name!r} {why}")
            for slot in adapter.slots:
                slot.follow()
                placed.setdefault(slot.place, []).append((name, slot))
        for slots in placed.values():
            first = slots[0][1]
            mixed = MixedRows(first.base, {name: slot.wrapper for name, slot in slots}, rows)
            first.fill(mixed.train(first.base.training))
        hook = model.register_forward_pre_hook(rows.before_forward, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
    finally:
        for slots in placed.values():
            slots[0][1].fill(slots[0][1].base)
        put_in(model, before)


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """As :func:`mixed_adapters`; where all rows have one adapter, the model computes with that one as it is alone.

    Raises:
        ValueError: as :func:`mixed_adapters`.
    """
    if len({*names}) > 1:
        with mixed_adapters(model, names):
            yield
        return
    before = active_adapters(model)
    set_adapter(model, names[0])
    try:
        yield
    finally:
        set_adapter(model, before)


def not_mixable(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Which of these adapters a batch can have for all of its rows only."""
    check_names(model, names)
    before = take_out(model)
    try:
        return {name for name, adapter in adapters_of(model, names).items() if _why_alone(adapter)}
    finally:
        put_in(model, before)


def _why_alone(adapter: Adapter) -> str:
    """Why an adapter cannot be mixed with others; empty if it can."""
    if adapter.biases.held:
        return "trains biases, which belong to all rows of a batch"
    for slot in adapter.slots:
        if (why := getattr(slot.wrapper, "not_by_rows", None)) is not None:
            return f"changes {slot.attribute}, {why}"
    return ""
