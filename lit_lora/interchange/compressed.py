"""An adapter at a lower rank: the best one for each layer (Eckart-Young), and what is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lit_lora.interchange.factors import Factors, common_rank, relative_error, truncated
from lit_lora.interchange.stored_factors import read_factors, target_of, write_factors


class Compressed(NamedTuple):
    """What was written."""

    folder: Path
    ranks: dict[str, int]
    """Layer -> rank."""
    errors: dict[str, float]
    """Layer -> Frobenius norm of what is lost, relative to the adapter's change of it."""
    error: float
    """The same over all layers together."""


def compress_adapter(
    adapter: str | Path, output: str | Path, *, r: int | None = None, max_error: float | None = None
) -> Compressed:
    """Write an adapter at lower ranks, from its singular values; the base is not needed.

    Experts and groups of a convolution are cut down each for itself, to one rank. Rows of embeddings, copies, biases
    and DoRA's lengths stay as they are.

    Args:
        adapter: folder in PEFT's format, or an id on the Hub.
        output: folder to write to.
        r: the highest rank of a layer.
        max_error: in place of ``r``: the relative error that a layer may have, and the lowest rank that keeps to it.

    Raises:
        ValueError: if both or neither of ``r`` and ``max_error`` are given, or the adapter cannot be read.
    """
    if (r is None) == (max_error is None):
        raise ValueError("give r, the rank to come to, or max_error, the relative error that a layer may have")
    if r is not None and r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if max_error is not None and not 0 <= max_error < 1:
        raise ValueError(f"max_error must be in [0, 1), got {max_error}")
    read = read_factors(adapter)
    layers, errors, lost, whole = {}, {}, 0.0, 0.0
    for name, factors in read.layers.items():
        whole_layer = truncated([factors], [1.0], None, factors.lora_A.dtype)
        values = whole_layer.singular_values
        ranks_of_part = range(1, values.shape[-1] + 1)
        bound = max_error or 0
        kept = (
            max(1, r // factors.layout.unit)
            if r
            else next(k for k in ranks_of_part if relative_error(values, k) <= bound)
        )
        cut = whole_layer.at(min(kept, factors.lora_A.shape[-2]))
        layers[name], errors[name] = cut.factors, cut.error
        norm = float(values.norm())
        lost, whole = lost + (cut.error * norm) ** 2, whole + norm**2
    highest = max(each.r for each in layers.values())
    together: dict[str, list[Factors]] = {}
    for name, each in layers.items():
        together.setdefault(target_of(name), []).append(each)
    ranks = {target: common_rank(of_target) for target, of_target in together.items()}
    # A configuration has no name for the tensors of a parameter, and one for the two parts of an attention.
    ranks |= {name: highest for name in read.parameters}
    layers = {name: each.padded(ranks[target_of(name)]) for name, each in layers.items()}
    ranks = {name: each.r for name, each in layers.items()}
    differing = {target_of(name): rank for name, rank in ranks.items() if rank != highest}
    config = replace(
        read.stored.config, r=highest, lora_alpha=highest, use_rslora=False,
        rank_pattern=differing, alpha_pattern=dict(differing),
    )  # fmt: skip
    others = dict(read.others)
    for name, factors in read.layers.items():
        if (bias := others.get(f"{name}.lora_B.bias")) is not None:
            others[f"{name}.lora_B.bias"] = bias * factors.scaling  # which is 1 from here on
    folder = write_factors(output, layers, config, [read], others)
    return Compressed(folder, ranks, errors, (lost / whole) ** 0.5 if whole else 0.0)
