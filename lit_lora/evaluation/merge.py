"""An adapter folded into its base, as a folder that plain transformers loads, and what that changed."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_lora.adapters.matching import some
from lit_lora.adapters.merge import merge_lora
from lit_lora.base.base_weight import is_quantized
from lit_lora.base.load import load_base_model
from lit_lora.base.quantize import dequantize_, transformers_quantization_config
from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import QuantizationConfig
from lit_lora.data.chats.turn_end import text_end, turn_end
from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source
from lit_lora.evaluation.drift import Drift, measure_drift, sample_logits
from lit_lora.evaluation.load import trained_dtype
from lit_lora.files.shipped import FOLDER, shipped
from lit_lora.interchange.adapter_folder import (
    base_of_adapter,
    check_base,
    default_quantization,
    folder_record,
    local_folder,
)
from lit_lora.interchange.adapter_tokenizer import tokenizer_for
from lit_lora.interchange.peft_format import load_adapter
from lit_lora.language_model.generation import stop_tokens
from lit_lora.wording import setting

DEFAULT_SAMPLE = "data/requests_test.jsonl"
"""Shipped texts that the drift is measured on."""


class Merged(NamedTuple):
    """What was written."""

    folder: Path
    dtype: str
    """Of its weights."""
    drifts: dict[str, Drift]
    """Of the merged model's logits, by what they are compared with; measured on what was written."""
    stop_strings: tuple[str, ...]
    """What ends an answer and is no token: whatever serves the model has to be told."""


def merge(
    adapter: str,
    output: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    into: Literal["base", "dequantized", "4bit"] = "base",
    quantization: QuantizationConfig | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    sample: str | None = None,
    num_samples: int = 16,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge an adapter into its base, and measure what that changes.

    Args:
        adapter: folder in PEFT's format.
        output: folder to make: model, the tokenizer and chat template of the training, and what ends an answer.
        base: base model, as in ``load_base_model``; by default the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the adapter names.
        into: "base" merges into the weights as they were before quantization; "dequantized" into those that a
            quantized base computes with; "4bit" does that and quantizes the result again, which loses precision.
        quantization: how the base was quantized in training; by default as the adapter says, or its run's config.yaml.
        dtype: dtype of the merged weights; by default that of the base in training. auto is bfloat16 on CUDA and
            float32 on a CPU.
        tokenizer: name or folder of another tokenizer than the adapter's.
        sample: file of texts to measure the drift on, in any format that training reads; by default one that ships.
        num_samples: how many of its texts.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.

    Raises:
        ValueError: if the output is there already, adapter and base do not belong together, or hold NaN or infinity.
            Nothing is written then.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give a new or empty folder as output")
    adapter = local_folder(adapter)
    place, record = base_of_adapter(adapter, base, revision), folder_record(adapter)
    quantization = quantization or default_quantization(adapter, place).quantization
    if into == "4bit":
        again = quantization or QuantizationConfig()
        if again.bits != 4 or again.embedding_bits or again.block_size != 64:
            raise ValueError(
                f"{setting('into', '4bit')} writes what transformers reads: bits 4, block_size 64, no embedding_bits"
            )
        warnings.warn(
            "merging into 4 bits rounds the sum of base and adapter again and loses part of what was trained: see the "
            "drift below, and prefer --into base or serving the adapter beside the base",
            UserWarning,
            stacklevel=2,
        )

    chosen = tokenizer_for(place, adapter, record, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    texts = _texts(sample, chosen, num_samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    written_with: dict[str, Any] = {
        "dtype": dtype or trained_dtype(record, device),
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    options = {**written_with, "revision": place.revision}
    references = {}
    if quantization is not None or into != "base":
        model = load_base_model(place.name, quantization=quantization, **options)
        if into != "base" and not any(is_quantized(module) for module in model.modules()):
            raise ValueError(
                f"{setting('into', into)} needs to know how the base was quantized: give "
                f"{setting('model.quantization.bits', 4)}"
            )
        check_base(adapter, record, model, place, other_base=other_base)
        load_adapter(model, adapter)
        references["the unmerged model as trained, on its quantized base"] = sample_logits(model, texts)
        if into != "base":
            dequantize_(model)
    if into == "base":
        model = load_base_model(place.name, **options)
        check_base(adapter, record, model, place, other_base=other_base)
        load_adapter(model, adapter)
        references["the unmerged model on the same base"] = sample_logits(model, texts)
    merge_lora(model)
    if broken := [name for name, p in model.named_parameters() if p.is_floating_point() and not p.isfinite().all()]:
        raise ValueError(
            f"{place.name} holds NaN or infinity in {some(broken)}: nothing is merged. Take an undamaged copy"
        )

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        stop_strings = _end_answers_as_trained(model, chosen, record)
        model.save_pretrained(partial)
        if into == "4bit":
            config = transformers_quantization_config(again, model.dtype)
            model = AutoModelForCausalLM.from_pretrained(partial, dtype=model.dtype, quantization_config=config)
            shutil.rmtree(partial)
            model.save_pretrained(partial)
        chosen.save_pretrained(partial)
        written = load_base_model(str(partial), **written_with)  # what was written, not what was meant
        merged = sample_logits(written, texts)
        drifts = {name: measure_drift(logits, merged) for name, logits in references.items()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(folder, str(model.dtype).removeprefix("torch."), drifts, stop_strings)


def _end_answers_as_trained(model: Any, tokenizer: Any, record: TrainedOn) -> tuple[str, ...]:
    """Say in ``generation_config.json`` what ends an answer, so that whoever generates stops there.

    Returns:
        What ends one and is no token.
    """
    end = text_end(tokenizer) if record.format == "text" else turn_end(tokenizer)
    fields = model.generation_config.to_dict() | {"eos_token_id": stop_tokens(model, tokenizer, end)}
    fields |= {name: own for name in ("bos_token_id", "pad_token_id") if (own := getattr(tokenizer, name)) is not None}
    fields.pop("_from_model_config", None)  # transformers 4 would take config.json's ids instead
    model.generation_config = GenerationConfig.from_dict(fields)
    return tuple(end.strings)


def _texts(sample: str | None, tokenizer: Any, num_samples: int) -> list[list[int]]:
    path = shipped(sample) or sample if sample else str(FOLDER / DEFAULT_SAMPLE)
    with tempfile.TemporaryDirectory() as cache:
        examples = tokenize_source(path, tokenizer, SourceSettings(limit=num_samples), cache_dir=Path(cache))
        return [examples[index].ids.tolist() for index in range(len(examples))]
