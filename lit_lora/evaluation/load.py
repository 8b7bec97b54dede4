"""A base with an adapter on it, loaded as it was trained."""

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.base.load import load_base_model, resolve_dtype
from lit_lora.base.streamed import load_sharded_base
from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import QuantizationConfig
from lit_lora.evaluation.divided import sharding_in_use
from lit_lora.interchange.adapter_folder import (
    Base,
    base_of_adapter,
    check_base,
    default_quantization,
    folder_record,
    local_folder,
)
from lit_lora.interchange.adapter_tokenizer import tokenizer_for
from lit_lora.interchange.peft_format import load_adapter
from lit_lora.wording import setting

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model to run."""

    model: PreTrainedModel
    """In evaluation mode, with the adapter."""
    tokenizer: PreTrainedTokenizerBase
    """The adapter's; without an adapter, the base's."""
    trained_on: TrainedOn
    """What the adapter was trained with."""


def load(
    adapter: str | None = None,
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

    What is None is taken as the adapter was trained, where it says so.

    Args:
        adapter: folder in PEFT's format, or an id on the Hub; None for the base alone.
        base: as in ``load_base_model``; None for the base that the adapter names.
        revision: of the base on the Hub.
        quantization: how to quantize the base.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: dtype of the base's weights.
        tokenizer: name or folder.
        other_base: whether the base may have other weights than the one that the adapter was trained on.
        trust_remote_code: run code that comes with the base or the tokenizer.

    Raises:
        ValueError: if neither tells the base, or the adapter's files cannot be read or do not belong together.
        FileNotFoundError: if the adapter folder has no ``adapter_config.json``.
    """
    if full_precision and quantization is not None:
        raise ValueError("full_precision and quantization exclude each other: give one of them")
    device, record = torch.device("cuda" if torch.cuda.is_available() else "cpu"), TrainedOn()
    if adapter is None:
        if base is None:
            raise ValueError(
                f"which model? Give {setting('model.base')}, or {setting('adapter')} whose config names its base"
            )
        place = Base(base, revision)
    else:
        adapter = local_folder(adapter)
        place, record = base_of_adapter(adapter, base, revision), folder_record(adapter)
        if quantization is None and not full_precision:
            quantization, source = default_quantization(adapter, place)
            if quantization is not None:
                log.info(
                    f"the base is quantized to {quantization.bits} bits, as the adapter was trained ({source}); "
                    f"{setting('full_precision')} leaves it as it is"
                )
    dtype = dtype or trained_dtype(record, device)
    chosen = tokenizer_for(place, adapter, record, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    sharding = sharding_in_use()
    model = (load_base_model if sharding is None else partial(load_sharded_base, sharding=sharding))(
        place.name,
        dtype=dtype,
        quantization=quantization,
        device=device,
        revision=place.revision,
        trust_remote_code=trust_remote_code,
    )
    if adapter is not None:
        check_base(adapter, record, model, place, other_base=other_base)
        load_adapter(model, adapter)
    return Loaded(model.eval(), chosen, record)


def trained_dtype(record: TrainedOn, device: torch.device) -> str:
    """dtype of the base's weights as in training, said where it is not what this device would take; else "auto"."""
    if record.dtype is None:
        return "auto"
    if resolve_dtype(record.dtype, device) != resolve_dtype("auto", device):
        log.info(
            f"the base is in {record.dtype}, as the adapter was trained; {setting('model.dtype', 'auto')} changes it"
        )
    return record.dtype
