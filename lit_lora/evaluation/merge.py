"""An adapter folded into its base, as a folder that plain transformers loads, and what that changed."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from lit_lora.adapters.merge import merge_lora
from lit_lora.base.base_weight import is_quantized
from lit_lora.base.load import is_quantized_already, load_base_model
from lit_lora.base.one_at_a_time import OneAtATime, open_base
from lit_lora.base.quantize import dequantize_, transformers_quantization_config
from lit_lora.base.trained_on import TrainedOn
from lit_lora.config import QuantizationConfig
from lit_lora.data.chats.turn_end import text_end, turn_end
from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source
from lit_lora.evaluation.drift import Drift, measure_drift, sample_logits
from lit_lora.evaluation.load import trained_dtype
from lit_lora.evaluation.merge_parts import PartsMerge, check_finite
from lit_lora.files.shipped import FOLDER, shipped
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
from lit_lora.language_model.generation import stop_tokens
from lit_lora.wording import setting

ON_BASE = "the unmerged model on the same base"
ON_QUANTIZED = "the unmerged model as trained, on its quantized base"

_UNKNOWN_QUANTIZATION = "{} needs to know how the base was quantized: give {}"

_CHOICE: tuple[Literal["base", "dequantized"], ...] = ("base", "dequantized")
"""What "auto" chooses from."""

DEFAULT_SAMPLE = "data/requests_test.jsonl"
"""Shipped texts that the drift is measured on."""


Into = Literal["auto", "base", "dequantized", "4bit"]
"""Which weights an adapter is merged into."""


class Merged(NamedTuple):
    """What was written."""

    folder: Path
    dtype: str
    """Of its weights."""
    drifts: dict[str, Drift]
    """Of the merged model's logits, by what they are compared with; measured on what was written."""
    stop_strings: tuple[str, ...]
    """What ends an answer and is no token: whatever serves the model has to be told."""
    whole: str
    """Why the base was in memory as a whole; empty where one layer was at a time."""
    into: str
    """Which weights the adapter was merged into: base, dequantized or 4bit."""
    tried: dict[str, float]
    """Where there was a choice: what to merge into -> KL of the merged model from the trained one, in nats/token."""

    def said(self) -> list[str]:
        """What was merged into and why, how, and how far it is from what was trained; a line each."""
        how = f"with the whole base in memory: {self.whole}" if self.whole else "one layer in memory at a time"
        lines = [f"merged into {self.into} in {self.dtype}, {how}"]
        if self.tried:
            figures = ", ".join(f"{name} {kl:.2g}" for name, kl in self.tried.items())
            lines.append(f"  {self.into} is nearest to what was trained: KL {figures} nats/token")
        return lines + [f"  against {name}: {drift}" for name, drift in self.drifts.items()]


def merge(
    adapter: str,
    output: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    into: Into = "auto",
    quantization: QuantizationConfig | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    sample: str | None = None,
    num_samples: int = 16,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge an adapter into its base, and measure what that changes.

    The base is read, merged and written a layer at a time, or as a whole where transformers rearranges it on loading.

    Args:
        adapter: folder in PEFT's format.
        output: folder to make: model, the tokenizer and chat template of the training, and what ends an answer.
        base: base model, as in ``load_base_model``; by default the one that the adapter names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the adapter names.
        into: "base" merges into the weights as they were before quantization; "dequantized" into those that a
            quantized base computes with; "auto" measures both on the sample and takes the one that is nearer to the
            model as trained; "4bit" quantizes the dequantized result again, which loses precision.
        quantization: how the base was quantized in training; by default as the adapter says, or its run's config.yaml.
        dtype: dtype of the merged weights; by default that of the base in training. auto is what this device
            takes for a base.
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
            "drift below, and prefer --into auto or serving the adapter beside the base",
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
    opened: OneAtATime | str = "the result is quantized whole"
    if into != "4bit":
        opened = open_base(place.name, quantization=quantization, **options)
    if not isinstance(opened, str) and into == "dequantized" and quantization is None:
        raise ValueError(_UNKNOWN_QUANTIZATION.format(setting("into", into), setting("model.quantization.bits", 4)))
    if into == "auto" and is_quantized_already(place.name, place.revision):
        into = "dequantized"
    elif into == "auto" and quantization is None:
        into = "base"
    candidates = _CHOICE if into == "auto" else (into,)

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tried: dict[str, float] = {}
    model: Any
    try:
        if isinstance(opened, str):

            def merged_whole(into: str) -> tuple[Any, dict[str, list[Tensor]]]:
                return _merged_whole(place, adapter, record, into, quantization, options, texts, other_base)

            for into in candidates:
                model = None  # of several one is in memory at a time
                model, references = merged_whole(into)
                if len(candidates) > 1:
                    tried[into] = measure_drift(references[ON_QUANTIZED], sample_logits(model, texts)).kl
            if tried and _nearest(tried) != into:
                into, model = _nearest(tried), None
                model, references = merged_whole(into)
            stop_strings = _end_answers_as_trained(model, chosen, record)
            model.save_pretrained(partial)
            if into == "4bit":
                config = transformers_quantization_config(again, model.dtype)
                model = AutoModelForCausalLM.from_pretrained(partial, dtype=model.dtype, quantization_config=config)
                shutil.rmtree(partial)
                model.save_pretrained(partial)
        else:
            model = opened.model
            check_base(adapter, record, model, place, other_base=other_base)
            parts = PartsMerge(opened, adapter, quantization)
            references = {}
            if quantization is not None:
                references[ON_QUANTIZED] = parts.logits(texts, quantized=True)
            if into == "auto":
                for name in candidates:
                    logits = parts.merged_logits(texts, dequantized=name == "dequantized")
                    tried[name] = measure_drift(references[ON_QUANTIZED], logits).kl
                into = _nearest(tried)
            if into == "base":
                references[ON_BASE] = parts.logits(texts, quantized=False)
            partial.mkdir(parents=True)
            parts.write(partial, dequantized=into == "dequantized")
            stop_strings = _end_answers_as_trained(model, chosen, record)
            _save_configs(model, partial)
        chosen.save_pretrained(partial)
        merged = _logits_of_written(partial, texts, in_parts=not isinstance(opened, str), **written_with)
        drifts = {name: measure_drift(logits, merged) for name, logits in references.items()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    whole = opened if isinstance(opened, str) else ""
    return Merged(folder, str(model.dtype).removeprefix("torch."), drifts, stop_strings, whole, into, tried)


def _nearest(tried: dict[str, float]) -> Literal["base", "dequantized"]:
    """The smaller one; the base itself where they are the same but for rounding (a millionth of a nat)."""
    return min(_CHOICE, key=lambda name: round(tried[name], 6))


def _merged_whole(
    place: Base,
    adapter: str,
    record: TrainedOn,
    into: str,
    quantization: QuantizationConfig | None,
    options: dict[str, Any],
    texts: list[list[int]],
    other_base: bool,
) -> tuple[Any, dict[str, list[Tensor]]]:
    """The merged model in memory, and the logits of what it is to be compared with."""
    references: dict[str, list[Tensor]] = {}
    if quantization is not None or into != "base":
        model = load_base_model(place.name, quantization=quantization, **options)
        if into != "base" and not any(is_quantized(module) for module in model.modules()):
            raise ValueError(_UNKNOWN_QUANTIZATION.format(setting("into", into), setting("model.quantization.bits", 4)))
        check_base(adapter, record, model, place, other_base=other_base)
        load_adapter(model, adapter)
        references[ON_QUANTIZED] = sample_logits(model, texts)
        if into != "base":
            dequantize_(model)
    if into == "base":
        model = load_base_model(place.name, **options)
        check_base(adapter, record, model, place, other_base=other_base)
        load_adapter(model, adapter)
        references[ON_BASE] = sample_logits(model, texts)
    merge_lora(model)
    check_finite(dict(model.named_parameters()), place.name)
    return model, references


def _logits_of_written(folder: Path, texts: list[list[int]], *, in_parts: bool, **options: Any) -> list[Tensor]:
    """Of what was written, not of what was meant."""
    if in_parts:
        written = open_base(str(folder), **options)
        assert not isinstance(written, str), written
        return written.logits(texts)
    return sample_logits(load_base_model(str(folder), **options), texts)


def _save_configs(model: Any, folder: Path) -> None:
    """What ``save_pretrained`` writes beside the weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


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
