"""``lit-lora combine``: one adapter of several of the same base."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_lora.config import Combination


def combine(
    output: str,
    adapters: list[str],
    weights: list[float] | None = None,
    how: Combination = "svd",
    r: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> Path:
    """Make one adapter of several, with a weight for each; the base is not needed.

    Args:
        output: folder to write to.
        adapters: folders in PEFT's format, or ids on the Hub.
        weights: one for each, such as [0.7,0.3], also negative; by default equal ones that sum to 1.
        how: "cat" is the weighted sum, at the sum of ranks, and "svd" the best approximation of it at a lower rank.
            The others work on A and B for themselves, as PEFT does; with _svd behind the name on their products.
        r: rank of the result for svd and its kin; by default the highest of the adapters.
        density: share of the values that ties, dare and magnitude_prune keep, in (0, 1].
        majority_sign: whether ties lets the sum of values or their number decide on a sign.
        seed: of what dare keeps.

    Returns:
        The folder.
    """
    from lit_lora.interchange.combined import combine_adapters

    folder = combine_adapters(
        adapters, output, weights=weights, how=how, r=r, density=density, majority_sign=majority_sign, seed=seed
    )
    print(f"{len(adapters)} adapters combined in {folder} ({how})")
    return folder
