"""Several adapters of one base made into one: PEFT's ``add_weighted_adapter``, on folders, without the base.

"linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" work on A and B for themselves, as PEFT does, each
with the root of weight and scale: the result has their rank, and its product is not the sum of theirs. "cat" is that
sum, at the sum of the ranks, and "svd" the best approximation of it at a lower one. With ``_svd`` behind the name, the
others work on the products, and the result is cut down to a rank: large matrices, one layer at a time.

TIES: arXiv:2306.01708. DARE: arXiv:2311.03099. Task arithmetic: arXiv:2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_lora.adapters.module_names import some
from lit_lora.config import Combination, LoRAConfig
from lit_lora.interchange.factors import Factors, common_rank, truncated
from lit_lora.interchange.stored_factors import AdapterFactors, names_to_write, read_factors, same_base, write_factors

_Combine = Callable[[list[Tensor], list[float]], Tensor]


def combine_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    *,
    weights: Sequence[float] | None = None,
    how: Combination = "svd",
    r: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> Path:
    """Make one adapter of several.

    Args:
        adapters: folders in PEFT's format, or ids on the Hub.
        output: folder to write to.
        weights: one for each, also negative; None for equal ones that sum to 1.
        how: see above.
        r: rank of the result for "svd" and its kin; None for the highest of the adapters.
        density: share of the values that "ties", "dare" and "magnitude_prune" keep, in (0, 1].
        majority_sign: whether "ties" lets the sum of values or their number decide on a sign.
        seed: of what "dare" keeps.

    Returns:
        The folder.

    Raises:
        ValueError: if they do not belong together, hold what cannot be combined, or a setting has no effect.
    """
    read = [read_factors(folder) for folder in adapters]
    factors = list(weights) if weights is not None else [1 / len(read)] * len(read)
    _check(read, factors, how, r, density)
    same_base(read)
    layers: dict[str, Factors] = {}
    functions = _functions(density, majority_sign, torch.Generator().manual_seed(seed))
    combine = functions.get(how.removesuffix("svd").rstrip("_"))
    highest = r or max(each.r for adapter in read for each in adapter.layers.values())
    for name in dict.fromkeys(name for adapter in read for name in adapter.layers):
        there = [(adapter.layers[name], w) for adapter, w in zip(read, factors, strict=True) if name in adapter.layers]
        layers[name] = _combined(name, [f for f, _ in there], [w for _, w in there], how, highest, combine)
    rank = common_rank(list(layers.values()))
    layers = {name: each.padded(rank) for name, each in layers.items()}
    config = LoRAConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=names_to_write(read, list(layers)),
        target_parameters=read[0].stored.config.target_parameters,
    )
    return write_factors(output, layers, config, read, {})


def _combined(
    name: str, factors: list[Factors], weights: list[float], how: Combination, r: int, combine: _Combine | None
) -> Factors:
    first, dtype = factors[0], factors[0].lora_A.dtype
    r = max(1, r // first.layout.unit)
    if len(sizes := {each.sizes for each in factors}) > 1:
        raise ValueError(f"the adapters have other sizes of {name}, {sorted(sizes)}: they belong to different bases")
    if how == "svd":
        return truncated(factors, weights, r, dtype).factors
    if how == "cat":
        A = torch.cat([each.lora_A * w * each.scaling for each, w in zip(factors, weights, strict=True)], dim=-2)
        return first._replace(lora_A=A, lora_B=torch.cat([each.lora_B for each in factors], dim=-1), scaling=1.0)
    assert combine is not None
    if how.endswith("svd"):
        U, S, Vh = torch.linalg.svd(combine([each.product() for each in factors], weights), full_matrices=False)
        lora_B = U[..., :r] * S[..., None, :r]
        return first._replace(lora_A=Vh[..., :r, :].to(dtype), lora_B=lora_B.to(dtype), scaling=1.0)
    if len({each.r for each in factors}) > 1:
        raise ValueError(
            f"the adapters have ranks {[each.r for each in factors]} in {name}, and {how!r} works on A and B for "
            "themselves: give 'svd' or 'cat', or compress them to one rank before"
        )
    scaled = [w * each.scaling for each, w in zip(factors, weights, strict=True)]
    roots = [math.sqrt(abs(w)) for w in scaled]
    signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
    A = combine([each.lora_A for each in factors], signed).to(dtype)
    return first._replace(lora_A=A, lora_B=combine([each.lora_B for each in factors], roots).to(dtype), scaling=1.0)


def _functions(density: float | None, majority_sign: str, generator: torch.Generator) -> dict[str, _Combine]:
    """Name -> how tensors and their weights become one tensor."""
    kept = 1.0 if density is None else density

    def largest(tensor: Tensor) -> Tensor:
        mask = torch.zeros_like(tensor).flatten()
        mask[tensor.abs().flatten().topk(int(kept * tensor.numel())).indices] = 1
        return tensor * mask.view_as(tensor)

    def at_random(tensor: Tensor) -> Tensor:
        return tensor * torch.bernoulli(torch.full_like(tensor, kept), generator=generator) / kept

    def whole(tensor: Tensor) -> Tensor:
        return tensor

    def summed(prune: Callable[[Tensor], Tensor]) -> _Combine:
        def combine(tensors: list[Tensor], weights: list[float]) -> Tensor:
            pruned = torch.stack([prune(tensor) for tensor in tensors])
            return (pruned * _column(weights, pruned)).sum(0)

        return combine

    def elected(prune: Callable[[Tensor], Tensor]) -> _Combine:
        def combine(tensors: list[Tensor], weights: list[float]) -> Tensor:
            pruned = torch.stack([prune(tensor) for tensor in tensors])
            votes = pruned if majority_sign == "total" else pruned.sign()
            agrees = pruned.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
            return (pruned * _column(weights, pruned) * agrees).sum(0) / agrees.sum(0).clamp(min=1)

        return combine

    return {
        "linear": summed(whole),
        "magnitude_prune": summed(largest),
        "ties": elected(largest),
        "dare_linear": summed(at_random),
        "dare_ties": elected(at_random),
    }


def _column(weights: list[float], stacked: Tensor) -> Tensor:
    return torch.tensor(weights).view(-1, *[1] * (stacked.ndim - 1))


def _check(read: list[AdapterFactors], weights: list[float], how: str, r: int | None, density: float | None) -> None:
    if len(read) < 2:
        raise ValueError(f"expected at least two adapters, got {len(read)}")
    if len(weights) != len(read):
        raise ValueError(f"expected a weight for each of {len(read)} adapters, got {len(weights)}")
    if broken := [w for w in weights if not math.isfinite(w)]:
        raise ValueError(f"expected finite weights, got {broken[0]}")
    if how not in get_args(Combination):
        raise ValueError(f"how must be one of {', '.join(get_args(Combination))}, got {how!r}")
    if r is not None and (not how.endswith("svd") or r < 1):
        raise ValueError(f"r is the rank, at least 1, of 'svd' and its kin, got {r} with how {how!r}")
    prunes = how not in ("linear", "cat", "svd")
    if prunes and (density is None or not 0 < density <= 1):
        raise ValueError(f"how {how!r} needs density, the share of values that it keeps, in (0, 1], got {density}")
    if not prunes and density is not None:
        raise ValueError(f"density has no effect on how {how!r}: leave it out")
    for adapter in read:
        for kind, held in _no_products(adapter).items():
            if held:
                raise ValueError(
                    f"{adapter.stored.source} holds {kind} ({some(held)}), of which there is no weighted sum with "
                    "other adapters: merge it into the base, or leave it out"
                )
    parameters = [adapter.stored.config.target_parameters or [] for adapter in read]
    if any(each != parameters[0] for each in parameters):
        raise ValueError(
            f"the adapters are on different parameters, {' and '.join(str(each) for each in parameters)}: a file does "
            "not say which of its tensors are on which, so they can be combined where these lists are equal"
        )


def _no_products(adapter: AdapterFactors) -> dict[str, list[str]]:
    """Kind -> names of tensors of which a weighted sum would be no adapter that does what the adapters do."""
    ends = {
        "DoRA's lengths": ".lora_magnitude_vector",
        "rows of embeddings": ".token_adapter.trainable_tokens_delta",
        "biases of LoRA": ".lora_B.bias",
        "biases of the base": ".bias",
    }
    kinds: dict[str, list[str]] = {kind: [] for kind in (*ends, "modules trained in full")}
    for name in adapter.others:
        kinds[next((kind for kind, end in ends.items() if end in name), "modules trained in full")].append(name)
    return kinds
