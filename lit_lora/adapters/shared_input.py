"""Adapted layers that are called one after the other with the same tensor, computed together by the first of them.

Queries, keys and values of an attention, gate and up of an MLP: a model calls its layers one by one, so nothing of it
need be changed for that. The first one computes for all, and the others, called with that very tensor, hand out what
is ready. Whatever else they are called with, they compute themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

Layer = TypeVar("Layer")


class _Ready(NamedTuple):
    x: Tensor
    version: int
    out: Tensor


class SharedInput:
    """Layers that read the same tensor.

    Args:
        layers: in the order in which they are called.
    """

    def __init__(self, layers: Sequence[object]) -> None:
        self._layers = list(layers)
        self._ready: dict[int, _Ready] = {}

    def output(
        self, layer: object, x: Tensor, compute: Callable[[Sequence[object]], Sequence[Tensor] | None]
    ) -> Tensor | None:
        """What ``layer`` gives for ``x``, computed with the others or ready already; None if it has to see to itself.

        Args:
            layer: one of them.
            x: its input.
            compute: gives the outputs of all; None if they cannot be computed together now.
        """
        position = self._layers.index(layer)
        if position == 0:
            outs = compute(self._layers)
            if outs is None:
                self._ready.clear()
                return None
            # A tensor that is changed in place counts up its version: it is then another input.
            self._ready = {i: _Ready(x, x._version, out) for i, out in enumerate(outs) if i}
            return outs[0]
        ready = self._ready.pop(position, None)
        return ready.out if ready is not None and ready.x is x and ready.version == x._version else None
