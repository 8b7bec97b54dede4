"""The low-rank layers of an adapter in a folder as pairs of matrices, without its base: read, cut down, written.

Shapes: I inputs, O outputs (of an embedding: V tokens, D hidden, with A ``(R, V)`` and B ``(D, R)``), R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_lora.adapters import lora_layer
from lit_lora.adapters.matching import resolve_pattern, some
from lit_lora.base.trained_on import KEY, TrainedOn, read_record
from lit_lora.config import LoRAConfig
from lit_lora.interchange.adapter_writing import write_adapter
from lit_lora.interchange.peft_config import to_peft_config
from lit_lora.interchange.peft_folder import CONFIG_NAME, PREFIX, find_weights, read_config
from lit_lora.interchange.stored_adapter import StoredAdapter, read_adapter, stored_values

_ENDS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


class Factors(NamedTuple):
    """What an adapter adds to one layer: ``scaling * B @ A``."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    end_of_A: str
    """What A is called below its layer."""

    @property
    def r(self) -> int:
        """Rank."""
        return len(self.lora_A)

    def product(self) -> Tensor:
        """``scaling * B @ A``, float32."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scaling

    def named(self, layer: str) -> dict[str, Tensor]:
        """Both, by their names in the model."""
        return {f"{layer}.{self.end_of_A}": self.lora_A, f"{layer}.{_ENDS[self.end_of_A]}": self.lora_B}


class AdapterFactors(NamedTuple):
    """An adapter in a folder."""

    stored: StoredAdapter
    layers: dict[str, Factors]
    others: dict[str, Tensor]
    """What is no pair of matrices: lengths of DoRA, rows of embeddings, copies, biases."""
    record: TrainedOn
    content: dict[str, object]
    """Of ``adapter_config.json``."""


def read_factors(folder_or_hub_id: str | Path) -> AdapterFactors:
    """Read an adapter as pairs of matrices.

    Raises:
        ValueError: if it cannot be read, or adapts fused experts, whose matrices lie in one.
    """
    stored = read_adapter(folder_or_hub_id)
    assert stored.folder is not None
    if stored.config.target_parameters:
        raise ValueError(
            f"{stored.source} adapts parameters ({some(stored.config.target_parameters)}): without the base it is not "
            "known where one expert's matrices end. Only adapters of layers can be worked on so"
        )
    state = stored_values(stored)
    pairs = {name.removesuffix(f".{end}"): end for name in state for end in _ENDS if name.endswith(f".{end}")}
    alphas = resolve_pattern("alpha_pattern", stored.config.alpha_pattern, pairs)
    layers: dict[str, Factors] = {}
    for layer, end in pairs.items():
        lora_A, lora_B = state.pop(f"{layer}.{end}"), state.pop(f"{layer}.{_ENDS[end]}", None)
        if lora_B is None:
            raise ValueError(f"{stored.source} holds A of {layer} and no B: take an undamaged copy")
        if lora_A.ndim != 2 or ".base_layer." in layer:
            raise ValueError(
                f"{stored.source} adapts {layer}, which is no linear layer and no embedding: only adapters of these "
                "can be worked on without their base"
            )
        scaling = stored.config.scaling(len(lora_A), alphas.get(layer, stored.config.lora_alpha))
        layers[layer] = Factors(lora_A, lora_B, scaling, end)
    if not layers:
        raise ValueError(f"{stored.source} has no low-rank layers")
    record = read_record(find_weights(stored.folder))
    return AdapterFactors(stored, layers, state, record, read_config(stored.folder / CONFIG_NAME))


class Cut(NamedTuple):
    """A layer at a lower rank."""

    factors: Factors
    singular_values: Tensor
    """Of the layer before."""

    @property
    def error(self) -> float:
        """Frobenius norm of what is missing, relative to that of the layer."""
        return relative_error(self.singular_values, self.factors.r)

    def at(self, r: int) -> Cut:
        """At a rank that is lower still."""
        lora_A, lora_B = self.factors.lora_A[:r], self.factors.lora_B[:, :r]
        return self._replace(factors=self.factors._replace(lora_A=lora_A, lora_B=lora_B))


def truncated(factors: Sequence[Factors], weights: Sequence[float], r: int | None, dtype: torch.dtype) -> Cut:
    """The best sum of low rank of what several adapters add to a layer (Eckart-Young), and what it misses.

    The sum is not made: its singular values are those of a product of two triangles, of the sum of ranks each.

    Args:
        factors: of one layer.
        weights: one for each.
        r: rank to keep; None for all.
        dtype: of the result.
    """
    double = torch.float64
    A = torch.cat([each.lora_A.to(double) for each in factors])
    B = torch.cat([each.lora_B.to(double) * each.scaling * w for each, w in zip(factors, weights, strict=True)], dim=1)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.t())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.t(), full_matrices=False)
    kept = len(S) if r is None else min(r, len(S))
    lora_A, lora_B = Vh[:kept] @ Q_A.t(), Q_B @ (U[:, :kept] * S[:kept])
    return Cut(Factors(lora_A.to(dtype), lora_B.to(dtype), 1.0, factors[0].end_of_A), S)


def relative_error(singular_values: Tensor, r: int) -> float:
    """Frobenius norm of what rank ``r`` misses, relative to the whole."""
    whole = float(singular_values.norm())
    return float(singular_values[r:].norm()) / whole if whole else 0.0


def padded(factors: Factors, r: int) -> Factors:
    """The same at a higher rank."""
    lora_A, lora_B = lora_layer.padded(factors.lora_A, factors.lora_B, r)
    return factors._replace(lora_A=lora_A, lora_B=lora_B)


def write_factors(
    folder: str | Path,
    layers: Mapping[str, Factors],
    config: LoRAConfig,
    like: Sequence[AdapterFactors],
    others: Mapping[str, Tensor],
) -> Path:
    """Write layers as an adapter of PEFT's format.

    Args:
        folder: to make.
        layers: by name; their scale is that of ``config``.
        config: of the adapter.
        like: what it was made of: it belongs to their base, and its record says what theirs have in common.
        others: further tensors.

    Raises:
        ValueError: if the folder is one of those that it was made of, or a tensor holds NaN or infinity.
    """
    target = Path(folder)
    if any(target.resolve() == Path(each.stored.source).resolve() for each in like):
        raise ValueError(f"output {folder} is one of the adapters: give another folder")
    state = {key: tensor for name, each in layers.items() for key, tensor in each.named(name).items()} | {**others}
    if broken := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"the result holds NaN or infinity in {some(broken)}: it is not written")
    first = like[0].content
    base, revision, task = (first.get(key) for key in ("base_model_name_or_path", "revision", "task_type"))
    content = to_peft_config(
        config,
        str(base) if base else None,
        revision=str(revision) if revision else None,
        task_type=str(task) if task else None,
        fan_in_fan_out=bool(first.get("fan_in_fan_out")),
    )
    record = _common([each.record for each in like])
    metadata = {KEY: record.to_json()} if record != TrainedOn() else {}
    return write_adapter(target, {f"{PREFIX}{name}": tensor for name, tensor in state.items()}, content, metadata)


def names_to_write(adapters: Sequence[AdapterFactors], layers: Sequence[str]) -> list[str]:
    """``target_modules`` for layers: as the adapters have them where that means the same for all of them."""
    lists = [each.stored.config.target_modules for each in adapters]
    plain = all(
        isinstance(each.stored.config.target_modules, list)
        and each.stored.config.layers_to_transform is None
        and not each.stored.config.exclude_modules
        for each in adapters
    )
    return sorted({entry for entries in lists for entry in entries}) if plain else sorted(layers)


def same_base(adapters: Sequence[AdapterFactors]) -> None:
    """Refuse adapters of different bases.

    Raises:
        ValueError: naming them.
    """
    first = adapters[0]
    for other in adapters[1:]:
        hashes = (first.record.base_hash, other.record.base_hash)
        names = (first.content.get("base_model_name_or_path"), other.content.get("base_model_name_or_path"))
        known = None not in hashes
        if (known and hashes[0] != hashes[1]) or (not known and None not in names and names[0] != names[1]):
            raise ValueError(
                f"{first.stored.source} was trained on {names[0]}, and {other.stored.source} on {names[1]}, whose "
                "weights are others: their adapters are no changes of one model"
            )


def _common(records: Sequence[TrainedOn]) -> TrainedOn:
    """What several records agree on."""
    first = records[0]
    differing = {
        field.name: None
        for field in fields(TrainedOn)
        if any(getattr(record, field.name) != getattr(first, field.name) for record in records)
    }
    return replace(first, **{"started_from": None, **differing})
