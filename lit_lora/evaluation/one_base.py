"""Whether one base, held in one way, can stand beside several adapters: by what each was trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from lit_lora.base.base_hash import short
from lit_lora.base.load import resolve_dtype
from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import QuantizationConfig
from lit_lora.interchange.adapter_folder import Base, default_quantization, named_base, same_place
from lit_lora.wording import setting


class Stored(NamedTuple):
    """An adapter in a folder, which is on no model yet."""

    folder: str
    record: TrainedOn


def check_one_base(
    adapters: Mapping[str, Stored], place: Base, given: Collection[str], device: torch.device, *, verb: str = "load"
) -> None:
    """Check that adapters were trained on one base that was held in one way.

    Args:
        adapters: by name.
        place: of the base that is to be loaded.
        given: which of "base", "dtype" and "quantization" are set for all of them.
        device: that the base is to be on.
        verb: what can be done with one of them.

    Raises:
        ValueError: naming what differs, and how to make it the same.
    """

    def quantization(one: Stored) -> QuantizationConfig | None:
        return default_quantization(one.folder, place).quantization

    def dtype(one: Stored) -> str:
        return str(resolve_dtype(one.record.dtype or "auto", device)).removeprefix("torch.")

    apart = f"{verb} them one at a time"
    first, *others = adapters
    for name in others:
        one, other = adapters[first], adapters[name]
        if "base" not in given and (bases := _bases(one, other)):
            raise ValueError(_different(first, name, "base", bases, apart))
        compared: dict[str, tuple[Callable[[Stored], Any], str]] = {
            "dtype": (dtype, f"{setting('model.dtype')} sets one for all"),
            "quantization": (
                quantization,
                f"{setting('model.quantization.bits')} or {setting('full_precision')} sets one for all",
            ),
        }
        for what, (value, fix) in compared.items():
            values = value(one), value(other)
            if what not in given and values[0] != values[1]:
                raise ValueError(_different(first, name, what, values, fix))


def check_one_tokenizer(digests: Mapping[str, tuple[str, str]]) -> None:
    """Check that models are asked in the same tokens: one base cannot be compared with both otherwise.

    Args:
        digests: of vocabulary and chat template, by the adapter's name.

    Raises:
        ValueError: naming what differs, and how to make it the same.
    """
    first, *others = digests
    for name in others:
        for what, *values in zip(("tokenizer", "chat template"), digests[first], digests[name], strict=True):
            if values[0] != values[1]:
                raise ValueError(_different(first, name, what, values, f"{setting('tokenizer')} sets one for all"))


def _bases(one: Stored, other: Stored) -> tuple[str, str] | None:
    """Two bases that differ, as far as is known."""
    hashes = one.record.base_hash, other.record.base_hash
    kinds = [value.partition(":")[0] for value in hashes if value is not None]
    if hashes[0] is not None and hashes[1] is not None and kinds[0] == kinds[1]:
        return None if hashes[0] == hashes[1] else (short(hashes[0]), short(hashes[1]))
    names = named_base(one.folder), named_base(other.folder)
    if names[0] is None or names[1] is None or same_place(names[0].name, names[1].name):
        return None
    return names[0].name, names[1].name


def _different(first: str, name: str, what: str, values: Any, fix: str) -> str:
    shown = [f"{v.bits} bits" if isinstance(v, QuantizationConfig) else "none" if v is None else v for v in values]
    if shown[0] == shown[1]:
        shown = list(values)
    return (
        f"{first} and {name} were trained with different settings ({what}: {shown[0]} and {shown[1]}), so one base "
        f"cannot stand beside both: {fix}"
    )
