"""An adapter from a run, a checkpoint or PEFT, written for other tools."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_lora.base.load import holds_tokenizer, load_base_model
from lit_lora.base.trained_on import TrainedOn, forget, note, noted
from lit_lora.interchange.adapter_folder import (
    Base,
    base_of_adapter,
    check_base,
    folder_record,
    local_folder,
    trained_quantization,
)
from lit_lora.interchange.adapter_tokenizer import tokenizer_for
from lit_lora.interchange.peft_format import load_adapter, save_adapter
from lit_lora.module import LoRALightningModule
from lit_lora.wording import setting


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    base: str
    """Name or folder of the model that it is for."""


def export(
    source: str,
    output: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    portable: bool = True,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write an adapter in PEFT's format, with the tokenizer and the record of what it was trained with.

    Args:
        source: a checkpoint (.ckpt) of a run, or the folder of an adapter.
        output: folder to write to.
        base: base model, as in ``load_base_model``; by default the one that the source names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the source names.
        portable: one rank and one scale for all layers, for tools without rsLoRA and rank or alpha patterns
            (vLLM, llama.cpp). The adapter computes the same.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.

    Raises:
        ValueError: if source and base do not belong together.
    """
    if Path(source).suffix == ".ckpt":
        if other_base:
            raise ValueError(
                f"{setting('other_base')} is for the folder of an adapter: a checkpoint is read onto the base that it "
                f"was trained on ({setting('base')} says where that lies now)"
            )
        options = {name: value for name, value in {"base": base, "revision": revision}.items() if value is not None}
        module = LoRALightningModule.load_from_checkpoint(source, trust_remote_code=trust_remote_code, **options)
        assert module.model is not None
        model, place, folder = module.model, Base(module.base, module.revision), None
    else:
        source = local_folder(source)
        if Path(source).resolve() == Path(output).resolve():
            raise ValueError(f"output {output} is the adapter itself: give another folder")
        place, folder = base_of_adapter(source, base, revision), source
        record, quantized = folder_record(source), trained_quantization(source)
        model = load_base_model(place.name, device="cpu", revision=place.revision, trust_remote_code=trust_remote_code)
        check_base(source, record, model, place, other_base=other_base)
        load_adapter(model, source)
        forget(model)  # how this base was loaded says nothing about the training
        note(model, **{**vars(record), "revision": place.revision})
        if record.quantization is None and quantized.source:
            note(model, quantization=quantized.quantization or "none")
    chosen = _tokenizer(place, folder, noted(model), trust_remote_code)
    written = save_adapter(model, output, base_model_name=place.name, portable=portable, tokenizer=chosen)
    return Exported(written, place.name)


def _tokenizer(
    base: Base, folder: str | None, record: TrainedOn, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """What the adapter was trained with, where that is known and found."""
    if record.vocabulary_sha256 is None and not (folder is not None and holds_tokenizer(Path(folder))):
        return None
    try:
        return tokenizer_for(base, folder, record, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        warnings.warn(f"the adapter is written without its tokenizer: {error}", UserWarning, stacklevel=3)
        return None
