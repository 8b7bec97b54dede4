"""Load a base with an adapter as it was trained, and measure the loss: what ``generate`` and ``evaluate`` share."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.base.load import load_base_model, resolve_dtype
from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import QuantizationConfig
from lit_lora.data.dataset import TokenizedExample
from lit_lora.data.formats import Examples
from lit_lora.data.packing import collate_packed
from lit_lora.data.tokenize import encode_examples
from lit_lora.evaluation.generation import check_vocabulary
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
from lit_lora.language_model.forward import language_model_loss
from lit_lora.language_model.trial import choose_path


class Loaded(NamedTuple):
    """A model to run."""

    model: PreTrainedModel
    """In evaluation mode, with the adapter."""
    tokenizer: PreTrainedTokenizerBase
    """The adapter's; without an adapter, the base's."""
    trained_on: TrainedOn
    """What the adapter was trained with."""


def load_for_inference(
    base: str | None,
    adapter: str | None,
    *,
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
        base: as in ``--model.base``; None for the base that the adapter names.
        adapter: folder in PEFT's format, or an id on the Hub.
        revision: of the base on the Hub.
        quantization: how to quantize the base.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: of the base's weights.
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
            raise ValueError("which model? Give --base, or --adapter whose config names its base")
        place = Base(base, revision)
    else:
        adapter = local_folder(adapter)
        place, record = base_of_adapter(adapter, base, revision), folder_record(adapter)
        if quantization is None and not full_precision:
            quantization, source = default_quantization(adapter, place)
            if quantization is not None:
                print(
                    f"the base is quantized to {quantization.bits} bits, as the adapter was trained ({source}); "
                    "--full_precision leaves it as it is",
                    file=sys.stderr,
                )
    dtype = dtype or trained_dtype(record, device)
    chosen = tokenizer_for(place, adapter, record, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    model = load_base_model(
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
        print(f"the base is in {record.dtype}, as the adapter was trained; --dtype auto changes it", file=sys.stderr)
    return record.dtype


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    max_length: int,
    train_on_prompt: bool = False,
    batch_size: int = 16,
) -> float:
    """Mean negative log-likelihood of the target tokens of all examples, in nats; as validation measures it.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        examples: conversations and texts.
        max_length: tokens of an example, the rest is cut off.
        train_on_prompt: count the tokens of prompts too.
        batch_size: examples at a time.

    Raises:
        ValueError: if no target is left within ``max_length``, the model does not know a token, or the loss is no
            number.
    """
    encoded = encode_examples(
        tokenizer, examples.items, examples.problems, max_length=max_length, train_on_prompt=train_on_prompt
    )
    tokenized = [
        TokenizedExample(index, np.array(example.ids, np.int32), np.array(example.mask, np.bool_))
        for index, example in enumerate(encoded)
        if any(example.mask)
    ]
    if not tokenized:
        raise ValueError(f"none of the {len(encoded)} examples has a target token among its first {max_length}")
    check_vocabulary(model, [example.ids for example in encoded])
    path = choose_path(model)
    nll_sum, num_targets = 0.0, 0
    for start in range(0, len(tokenized), batch_size):
        packed: Any = collate_packed(tokenized[start : start + batch_size])
        batch: Any = {name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in packed.items()}
        nll_sum += float(language_model_loss(model, batch, path).nll_sum)
        num_targets += batch["target_ids"].numel()
    if not math.isfinite(nll_sum):
        raise ValueError(f"the loss is {nll_sum}: base or adapter holds NaN or infinity, or overflows in {model.dtype}")
    return nll_sum / num_targets
