"""How much an exported adapter changes each layer: the norms of A, of B and of the update that they make.

Letters: r rank, O output features, I input features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lit_lora.adapters.matching import resolve_pattern
from lit_lora.callbacks._support.names import adapter_half, layer_group, module_path
from lit_lora.interchange.peft_config import from_peft_config
from lit_lora.interchange.peft_folder import CONFIG_NAME, PREFIX, WEIGHTS_NAME, read_config, read_tensors


@dataclass(frozen=True)
class LayerUpdate:
    """One adapted layer."""

    name: str
    """Its full name in the model."""
    layer: int | None
    """Its place among the numbered layers; None outside of them."""
    kind: str
    """The last part of its name, such as ``q_proj``."""
    norm_a: float
    """Frobenius norm of A, (r, I)."""
    norm_b: float
    """Frobenius norm of B, (O, r)."""
    norm_update: float
    """Frobenius norm of ``scale * B @ A``, (O, I)."""


def layer_updates(folder: Path) -> list[LayerUpdate]:
    """Of each adapted linear layer, in the order of the layers.

    Args:
        folder: of an adapter in PEFT's format.

    Raises:
        ValueError: if it is none that lit_lora reads.
        OSError: if a file is not there.
    """
    config = from_peft_config(read_config(folder / CONFIG_NAME))
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(folder / WEIGHTS_NAME).items():
        name = key.removeprefix(PREFIX)
        half = adapter_half(name)
        if half is not None and tensor.dim() == 2 and name.endswith(f"lora_{half}.weight"):
            halves.setdefault(module_path(name), {})[half] = tensor.double()
    pairs = {name: (pair["A"], pair["B"]) for name, pair in halves.items() if len(pair) == 2}
    ranks = resolve_pattern("rank_pattern", config.rank_pattern, list(pairs))
    alphas = resolve_pattern("alpha_pattern", config.alpha_pattern, list(pairs))
    updates = []
    for name, (a, b) in pairs.items():
        scale = config.scaling(ranks.get(name, config.r), alphas.get(name, config.lora_alpha))
        # |BA|^2 is the sum over (B'B) * (AA'), both (r, r): the update itself is never made.
        square = float(((b.T @ b) * (a @ a.T)).sum())
        norm_a, norm_b = float(a.norm()), float(b.norm())
        number = layer_group(name).rpartition(".")[2]
        updates.append(
            LayerUpdate(
                name,
                int(number) if number.isdigit() else None,
                name.rpartition(".")[2],
                norm_a,
                norm_b,
                abs(scale) * math.sqrt(max(square, 0.0)),
            )
        )
    return sorted(updates, key=lambda update: (math.inf if update.layer is None else update.layer, update.name))
