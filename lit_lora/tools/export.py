"""``lit-lora export``: an adapter from a run, a checkpoint or PEFT, written for other tools."""

from __future__ import annotations

from pathlib import Path


def export(
    source: str,
    output: str,
    base: str | None = None,
    revision: str | None = None,
    portable: bool = True,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter in PEFT's format, with the tokenizer and the record of what it was trained with.

    Args:
        source: a checkpoint (.ckpt) of a run, or the folder of an adapter.
        output: folder to write to.
        base: base model, as in --model.base; by default the one that the source names.
        revision: branch, tag or commit of the base on the Hub; by default the one that the source names.
        portable: one rank and one scale for all layers, for tools without rsLoRA and rank or alpha patterns
            (vLLM, llama.cpp). The adapter computes the same.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    from lit_lora.evaluation import export as exporting
    from lit_lora.runs.said import readable

    with readable():
        exported = exporting.export(
            source,
            output,
            base=base,
            revision=revision,
            portable=portable,
            other_base=other_base,
            trust_remote_code=trust_remote_code,
        )
    print(f"adapter for {exported.base} in {exported.folder}")
    return exported.folder
