"""AdamW for adapters whose A stays as it is: B follows the gradient that the whole weight would have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_lora.adapters.fixed_half import FixedHalf

_RIDGE = 1e-8


class LoRAFA(torch.optim.AdamW):
    """AdamW over ``(1/s^2) G (A A^T)^-1`` in place of the gradient G of B, as PEFT's ``create_lorafa_optimizer``.

    Of all changes of B that one is nearest, through A, to a step of the whole weight. A does not change, so its inverse
    is computed once.

    Args:
        groups: of parameters.
        halves: layers whose B is among them.
        options: of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], halves: Sequence[FixedHalf], **options: Any) -> None:
        super().__init__(groups, **options)
        self._halves = list(halves)
        self._inverses: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate, turn the gradients of B, and step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._inverses:
            self._inverses = [_inverse(half) for half in self._halves]
        for half, inverse in zip(self._halves, self._inverses, strict=True):
            if half.lora_B.grad is not None:
                half.lora_B.grad.copy_(half.lora_B.grad.float() @ inverse)
        super().step()
        return loss


def _inverse(half: FixedHalf) -> Tensor:
    A = half.lora_A.detach().float()
    unit = torch.eye(len(A), device=A.device)
    return torch.linalg.pinv(A @ A.T + _RIDGE * unit, hermitian=True) / half.scaling**2
