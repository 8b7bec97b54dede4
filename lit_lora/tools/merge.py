"""``lit-lora merge``: an adapter folded into its base, as a folder that plain transformers loads."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lit_lora.config import QuantizationConfig

if TYPE_CHECKING:
    from lit_lora.base.trained_on import TrainedOn
    from lit_lora.evaluation.drift import Drift

DEFAULT_SAMPLE = "data/requests_test.jsonl"
"""Shipped texts that the drift is measured on."""


def merge(
    adapter: str,
    output: str,
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
) -> dict[str, Drift]:
    """Merge an adapter into its base, and measure what that changes.

    Args:
        adapter: folder in PEFT's format.
        output: folder to make: model, the tokenizer and chat template of the training, and what ends an answer.
        base: base model, as in --model.base; by default the one that the adapter names.
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

    Returns:
        The drift of the merged model's logits, by what it is compared with.
    """
    from lit_lora.interchange.adapter_folder import (
        base_of_adapter,
        check_base,
        default_quantization,
        folder_record,
        local_folder,
    )

    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give a new or empty folder as output")
    adapter = local_folder(adapter)
    place, record = base_of_adapter(adapter, base, revision), folder_record(adapter)
    quantization = quantization or default_quantization(adapter, place).quantization
    if into == "4bit":
        again = quantization or QuantizationConfig()
        if again.bits != 4 or again.embedding_bits or again.block_size != 64:
            raise ValueError("--into 4bit writes what transformers reads: bits 4, block_size 64, no embedding_bits")
        warnings.warn(
            "merging into 4 bits rounds the sum of base and adapter again and loses part of what was trained: see the "
            "drift below, and prefer --into base or serving the adapter beside the base",
            UserWarning,
            stacklevel=2,
        )

    import torch
    from transformers import AutoModelForCausalLM

    from lit_lora.adapters.matching import some
    from lit_lora.adapters.merge import merge_lora
    from lit_lora.base.base_weight import is_quantized
    from lit_lora.base.load import load_base_model
    from lit_lora.base.quantize import dequantize_, transformers_quantization_config
    from lit_lora.evaluation.drift import measure_drift, sample_logits
    from lit_lora.evaluation.load import trained_dtype
    from lit_lora.interchange.adapter_tokenizer import tokenizer_for
    from lit_lora.interchange.peft_format import load_adapter

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
            raise ValueError(f"--into {into} needs to know how the base was quantized: give --quantization.bits 4")
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
        _end_answers_as_trained(model, chosen, record)
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
    print(f"merged into {folder} ({into}, {str(model.dtype).removeprefix('torch.')})")
    for name, drift in drifts.items():
        print(f"  against {name}: {drift}")
    return drifts


def _end_answers_as_trained(model: Any, tokenizer: Any, record: TrainedOn) -> None:
    """Say in ``generation_config.json`` what ends an answer, so that whoever generates stops there."""
    from transformers import GenerationConfig

    from lit_lora.data.turn_end import text_end, turn_end
    from lit_lora.evaluation.generation import stop_tokens

    end = text_end(tokenizer) if record.format == "text" else turn_end(tokenizer)
    fields = model.generation_config.to_dict() | {"eos_token_id": stop_tokens(model, tokenizer, end)}
    fields |= {name: own for name in ("bos_token_id", "pad_token_id") if (own := getattr(tokenizer, name)) is not None}
    fields.pop("_from_model_config", None)  # transformers 4 would take config.json's ids instead
    model.generation_config = GenerationConfig.from_dict(fields)
    if end.strings:
        print(
            f"an answer ends with the text {' or '.join(map(repr, end.strings))}, for which there is no token: give it "
            "as a stop string to whatever serves the merged model"
        )


def _texts(sample: str | None, tokenizer: Any, num_samples: int) -> list[list[int]]:
    import tempfile

    from lit_lora.cli.shipped import FOLDER, shipped
    from lit_lora.data.prepare import SourceSettings, tokenize_source

    path = shipped(sample) or sample if sample else str(FOLDER / DEFAULT_SAMPLE)
    with tempfile.TemporaryDirectory() as cache:
        examples = tokenize_source(path, tokenizer, SourceSettings(limit=num_samples), cache_dir=Path(cache))
        return [examples[index].ids.tolist() for index in range(len(examples))]
