"""``lit-lora export``: an adapter from a run, a checkpoint or PEFT, or its merged model, written for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lit_lora.wording import setting


def export(
    source: str,
    output: str,
    to: Literal["peft", "portable", "hf", "gguf", "ollama", "vllm", "mlx"] | None = None,
    base: str | None = None,
    revision: str | None = None,
    portable: bool | None = None,
    into: Literal["auto", "base", "dequantized"] = "auto",
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = "f16",
    adapter_only: bool = False,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter, or the model that it makes of its base, for other tools.

    Args:
        source: a checkpoint (.ckpt) of a run, or the folder of an adapter.
        output: folder to write to; for gguf the file.
        to: "portable" (the default) is PEFT's format with one rank and one scale for all layers, "peft" with those of
            training; "vllm" and "mlx" are the adapter as these read it; "hf" is the merged model as a folder, "gguf"
            as a file for llama.cpp, "ollama" as such a file with its Modelfile.
        base: base model, as in --model.base; by default the one that the source names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the source names.
        portable: true is --to portable, false is --to peft.
        into: which weights of a base that was quantized in training are merged into; see merge.
        gguf_type: what the weights of a GGUF file are stored as.
        adapter_only: with --to gguf, write the adapter alone.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    from lit_lora.evaluation.export_targets import Source, export_to
    from lit_lora.runs.said import readable

    if portable is not None and to is not None and to != ("portable" if portable else "peft"):
        raise ValueError(
            f"{setting('portable', portable)} and {setting('to', to)} exclude each other: give one of them"
        )
    chosen = to or ("peft" if portable is False else "portable")
    with readable():
        adapter = Source(source, base, revision, other_base, trust_remote_code)
        shipped = export_to(adapter, output, chosen, into=into, gguf_type=gguf_type, adapter_only=adapter_only)
    print(f"{shipped.what} in {shipped.path}")
    for note in shipped.notes:
        print(note)
    return shipped.path
