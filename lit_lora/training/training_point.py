"""Optimizers that train at one point of the parameters and stand for another: schedule-free ones.

They have ``train()`` and ``eval()``, which move the parameters from the one to the other and back, each time rounding.
A run has to be evaluated, exported and judged at the second point, and must go on at exactly the first. So parameters
are at the training point only while a batch is under way, and its values are kept, not computed back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def has_two_points(optimizer: Optimizer) -> bool:
    """Whether it has ``train()`` and ``eval()``."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


class TrainingPoint:
    """Brings parameters to the training point and back; does nothing for optimizers that have but one.

    Args:
        optimizers: those of the run.
        parameters: all that train, by name.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer] = (), parameters: Mapping[str, nn.Parameter] | None = None
    ) -> None:
        self._optimizers = [optimizer for optimizer in optimizers if has_two_points(optimizer)]
        self._parameters = parameters or {}
        self._kept: dict[str, Tensor] = {}
        """Values at the training point while the parameters are elsewhere; empty before the first step."""
        self._is_there = self._is_held = False

    @torch.no_grad()
    def enter(self) -> None:
        """Go to the training point, if not there."""
        if self._is_there or not self._optimizers:
            return
        for optimizer in self._optimizers:
            optimizer.train()  # type: ignore[attr-defined]
        for name, value in self._kept.items():
            self._parameters[name].copy_(value)
        self._is_there = True

    @torch.no_grad()
    def leave(self) -> None:
        """Go back to what the optimizer stands for, if at the training point and not within :meth:`held`."""
        if not self._is_there or self._is_held:
            return
        self._kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for optimizer in self._optimizers:
            optimizer.eval()  # type: ignore[attr-defined]
        self._is_there = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be there for a whole step."""
        self.enter()
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self.leave()

    def state_dict(self) -> dict[str, Tensor]:
        """Values at the training point, by name; empty where there is but one point."""
        return {name: value.cpu() for name, value in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there at the next :meth:`enter`."""
        self._kept = {name: value.to(self._parameters[name].device) for name, value in state.items()}
