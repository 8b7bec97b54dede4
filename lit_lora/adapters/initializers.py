"""How A and B start: one function and one entry of ``INITIALIZERS`` each.

All leave the base as it is: those that start as a part of the weight take it off again (``subtracted_start.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lit_lora.adapters.layers import LoRALayer, LoRALinear
from lit_lora.adapters.subtracted_start import StartedLinear
from lit_lora.config import LATER_STARTS


@torch.no_grad()
def kaiming(layer: LoRALayer) -> None:
    """Kaiming-uniform A, zero B (the reference implementation of arXiv:2106.09685)."""
    layer.start(lambda half: nn.init.kaiming_uniform_(half, a=math.sqrt(5)))


@torch.no_grad()
def gaussian(layer: LoRALayer) -> None:
    """A ~ N(0, 1/r^2), zero B, as PEFT."""
    layer.start(lambda half: nn.init.normal_(half, std=1 / layer.r))


@torch.no_grad()
def orthogonal(layer: LoRALayer) -> None:
    """A and B that are not zero and whose product is: random in orthogonal halves of the rank, as PEFT."""
    assert isinstance(layer, LoRALinear), "the plan has refused others"
    lora_A, lora_B = layer.factors()
    Q, _ = torch.linalg.qr(torch.randn(layer.r, layer.r))
    A = (torch.randn(layer.in_features, layer.r // 2) @ Q[0::2]).T / 10
    B = (torch.randn(layer.r // 2, layer.out_features).T @ Q[1::2]) / 10
    lora_A.copy_(A)
    lora_B.copy_(B)


@torch.no_grad()
def pissa(layer: LoRALayer, *, num_iterations: int | None = None) -> None:
    """The largest singular values and vectors of the weight (PiSSA, arXiv:2404.02948, eq. 2 to 4), as PEFT.

    Args:
        layer: a linear one.
        num_iterations: of a randomized estimate (Halko et al., arXiv:0909.4061); None for all singular values.
    """
    assert isinstance(layer, StartedLinear), "the plan has refused others"
    if (weight := _weight_to_start_as(layer)) is None:
        return
    if num_iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        U, S, Vh = U[:, : layer.r], S[: layer.r], Vh[: layer.r]
    else:
        U, S, V = torch.svd_lowrank(weight, layer.r, niter=num_iterations)
        Vh = V.t()
    root = (S / layer.scaling).sqrt()
    layer.start_as(root[:, None] * Vh, U * root)


@torch.no_grad()
def olora(layer: LoRALayer) -> None:
    """The first columns of Q and rows of R of the weight (OLoRA, arXiv:2406.01775), as PEFT."""
    assert isinstance(layer, StartedLinear), "the plan has refused others"
    if (weight := _weight_to_start_as(layer)) is None:
        return
    Q, R = torch.linalg.qr(weight)
    layer.start_as(R[: layer.r], Q[:, : layer.r])


def _weight_to_start_as(layer: StartedLinear) -> Tensor | None:
    return None if layer.is_valueless else layer.whole_weight()


@torch.no_grad()
def random(layer: LoRALayer) -> None:
    """Both random, so that the adapter changes the output from the start: for tests."""
    layer.start_at_random()


INITIALIZERS: dict[bool | str, Callable[[LoRALayer], None]] = {
    True: kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "pissa_niter_4": partial(pissa, num_iterations=4),
    "pissa_niter_16": partial(pissa, num_iterations=16),
    "olora": olora,
    **dict.fromkeys(LATER_STARTS, kaiming),  # until later_starts.py fills them
    False: random,
}
"""``LoRAConfig.init_lora_weights`` -> function that fills the layer's A and B."""
