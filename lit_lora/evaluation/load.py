"""A base with an adapter on it, or with several, loaded as they were trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.adapters.named_adapters import DEFAULT, active_adapters, unload_lora
from lit_lora.base.load import load_base_model, resolve_dtype
from lit_lora.base.streamed import load_sharded_base
from lit_lora.base.trained_on import TrainedOn
from lit_lora.base.vocabulary import num_rows
from lit_lora.config import QuantizationConfig
from lit_lora.data.data_record import chat_template_sha256, vocabulary_sha256
from lit_lora.evaluation.divided import sharding_in_use
from lit_lora.evaluation.one_base import Stored, check_one_base, check_one_tokenizer
from lit_lora.interchange.adapter_folder import (
    Base,
    base_of_adapter,
    check_base,
    default_quantization,
    folder_record,
    local_folder,
    named_base,
)
from lit_lora.interchange.adapter_naming import named_folders
from lit_lora.interchange.adapter_tokenizer import tokenizer_for
from lit_lora.interchange.peft_format import load_adapter
from lit_lora.interchange.stored_adapter import read_adapter
from lit_lora.wording import setting

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """How an adapter is asked: as it was trained."""

    tokenizer: PreTrainedTokenizerBase
    """Equal ones are one object."""
    trained_on: TrainedOn


@dataclass(frozen=True)
class Loaded:
    """A model to run; ``model, tokenizer, trained_on = load(...)`` takes it apart."""

    model: PreTrainedModel
    """In evaluation mode, with the adapter; of several, with the first."""
    tokenizer: PreTrainedTokenizerBase
    """The adapter's; without an adapter, the base's."""
    trained_on: TrainedOn
    """What the adapter was trained with."""
    adapters: Mapping[str, Asked] = field(default_factory=dict)
    """How each adapter is asked, by its name."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.tokenizer, self.trained_on))

    def asked(self, name: str | None) -> Asked:
        """How an adapter is asked; None for the base alone, which is asked as the first one."""
        return self.adapters.get(name or "", Asked(self.tokenizer, self.trained_on))


@dataclass(frozen=True)
class _Options:
    """Arguments of :func:`load`, but for the adapters."""

    base: str | None = None
    revision: str | None = None
    quantization: QuantizationConfig | None = None
    full_precision: bool = False
    dtype: str | None = None
    tokenizer: str | None = None
    other_base: bool = False
    trust_remote_code: bool = False


def load(
    adapter: str | Sequence[str] | Mapping[str, str] | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    dtype: str | None = None,
    tokenizer: str | None = None,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a base model, put an adapter on it if one is given, and load the tokenizer.

    What is None is taken as the adapter was trained, where it says so. Of several adapters the first is active, and the
    others lie beside it: ``generate(..., adapter_names=...)`` asks each, and ``set_adapter`` chooses another.

    Args:
        adapter: folder in PEFT's format, or an id on the Hub; several as a list, or by their names, as in
            ``{"french": "runs/a/adapter"}``; None for the base alone. In a list they are called after their runs.
        base: as in ``load_base_model``; None for the base that the adapter names.
        revision: of the base on the Hub.
        quantization: how to quantize the base.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: dtype of the base's weights.
        tokenizer: name or folder.
        other_base: whether the base may have other weights than the one that the adapter was trained on.
        trust_remote_code: run code that comes with the base or the tokenizer.

    Raises:
        ValueError: if neither tells the base, the adapter's files cannot be read or do not belong together, or one base
            cannot stand beside all adapters.
        FileNotFoundError: if the adapter folder has no ``adapter_config.json``.
    """
    options = _Options(base, revision, quantization, full_precision, dtype, tokenizer, other_base, trust_remote_code)
    given = {} if adapter is None else {DEFAULT: adapter} if isinstance(adapter, str) else named_folders(adapter)
    stored = _stored(given)
    place = _place(stored, options)
    asked = _asked(stored, place, options)
    first = next(iter(asked.values())) if asked else Asked(_tokenizer(None, TrainedOn(), place, options), TrainedOn())
    model = _load_base(stored, place, options)
    for name, one in stored.items():
        load_adapter(model, one.folder, name=name)
    return Loaded(model.eval(), first.tokenizer, first.trained_on, asked)


def load_in_turn(adapters: Mapping[str, str], **options: Any) -> Callable[[str], Loaded]:
    """Load a base once for adapters that are to be compared, which are on it one at a time.

    So memory does not grow with their number. Each is put on once before this returns, so that what is wrong with one
    is said before any of them is run.

    Args:
        adapters: folders in PEFT's format, by name.
        options: as for :func:`load`.

    Returns:
        Puts the adapter of a name in the place of the one that is on the base.

    Raises:
        ValueError: as :func:`load`, and for adapters that are asked in different tokens.
    """
    how = _Options(**options)
    stored = _stored(adapters)
    place = _place(stored, how, verb="evaluate")
    asked = _asked(stored, place, how)
    if len(asked) > 1:
        check_one_tokenizer({name: _digests(one.tokenizer) for name, one in asked.items()})
    model = _load_base(stored, place, how)
    rows = num_rows(model)

    def take(name: str) -> Loaded:
        if active_adapters(model) != [name]:
            unload_lora(model)
            if num_rows(model) > rows:  # those of tokens that the last one added
                model.resize_token_embeddings(rows, mean_resizing=False)
            load_adapter(model, stored[name].folder, name=name)
        return Loaded(model.eval(), *asked[name], {name: asked[name]})

    for name in reversed(stored):
        take(name)
    return take


def _stored(adapters: Mapping[str, str]) -> dict[str, Stored]:
    folders = {name: local_folder(adapter) for name, adapter in adapters.items()}
    return {name: Stored(folder, folder_record(folder)) for name, folder in folders.items()}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _place(adapters: Mapping[str, Stored], options: _Options, *, verb: str = "load") -> Base:
    """The base of all adapters, which can stand beside them."""
    if options.full_precision and options.quantization is not None:
        raise ValueError("full_precision and quantization exclude each other: give one of them")
    if not adapters:
        if options.base is None:
            raise ValueError(
                f"which model? Give {setting('model.base')}, or {setting('adapter')} whose config names its base"
            )
        return Base(options.base, options.revision)
    places: list[Base] = []
    for one in adapters.values():
        base = options.base or (places[0].name if places and named_base(one.folder) is None else None)
        places.append(base_of_adapter(one.folder, base, options.revision))
    given = {
        "base": options.base is not None or options.other_base,
        "dtype": options.dtype is not None,
        "quantization": options.quantization is not None or options.full_precision,
    }
    check_one_base(adapters, places[0], [what for what, is_given in given.items() if is_given], _device(), verb=verb)
    return places[0]


def _asked(adapters: Mapping[str, Stored], place: Base, options: _Options) -> dict[str, Asked]:
    found = {name: _tokenizer(one.folder, one.record, place, options) for name, one in adapters.items()}
    if len(found) > 1:
        shared: dict[tuple[str, str], PreTrainedTokenizerBase] = {}
        found = {name: shared.setdefault(_digests(tokenizer), tokenizer) for name, tokenizer in found.items()}
    return {name: Asked(tokenizer, adapters[name].record) for name, tokenizer in found.items()}


def _tokenizer(adapter: str | None, record: TrainedOn, place: Base, options: _Options) -> PreTrainedTokenizerBase:
    return tokenizer_for(
        place, adapter, record, tokenizer=options.tokenizer, trust_remote_code=options.trust_remote_code
    )


def _digests(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return vocabulary_sha256(tokenizer), chat_template_sha256(tokenizer)


def _load_base(adapters: Mapping[str, Stored], place: Base, options: _Options) -> PreTrainedModel:
    """The base as the first adapter was trained beside it; it is that of all."""
    device, quantization, record = _device(), options.quantization, TrainedOn()
    if adapters:
        folder, record = next(iter(adapters.values()))
        if quantization is None and not options.full_precision:
            quantization, source = default_quantization(folder, place)
            if quantization is not None:
                log.info(
                    f"the base is quantized to {quantization.bits} bits, as the adapter was trained ({source}); "
                    f"{setting('full_precision')} leaves it as it is"
                )
    load_one = load_base_model
    if (sharding := sharding_in_use()) is not None:
        rows = max((read_adapter(one.folder).config.vocabulary_rows for one in adapters.values()), default=0)
        load_one = partial(load_sharded_base, sharding=sharding, rows=rows)
    model = load_one(
        place.name,
        dtype=options.dtype or trained_dtype(record, device),
        quantization=quantization,
        device=device,
        revision=place.revision,
        trust_remote_code=options.trust_remote_code,
    )
    for one in adapters.values():
        check_base(one.folder, one.record, model, place, other_base=options.other_base)
    return model


def trained_dtype(record: TrainedOn, device: torch.device) -> str:
    """dtype of the base's weights as in training, said where it is not what this device would take; else "auto"."""
    if record.dtype is None:
        return "auto"
    if resolve_dtype(record.dtype, device) != resolve_dtype("auto", device):
        log.info(
            f"the base is in {record.dtype}, as the adapter was trained; {setting('model.dtype', 'auto')} changes it"
        )
    return record.dtype
