"""``lit-lora export``: an adapter from a run, a checkpoint or PEFT, written for readers of any kind."""

from __future__ import annotations

from pathlib import Path


def export(
    source: str,
    output: str,
    base: str | None = None,
    portable: bool = True,
    trust_remote_code: bool = False,
) -> Path:
    """Write an adapter in PEFT's format.

    Args:
        source: a checkpoint (.ckpt) of a run, or the folder of an adapter.
        output: folder to write to.
        base: base model, as in --model.base; by default the one that the source names.
        portable: one rank and one scale for all layers, for readers that know no rsLoRA and no rank or alpha patterns
            (vLLM, llama.cpp). The adapter computes the same.
        trust_remote_code: run code that comes with the base.
    """
    from lit_lora.adapters.peft_format import load_adapter, save_adapter

    if Path(source).suffix == ".ckpt":
        from lit_lora.module import LoRALightningModule

        options = {"base": base} if base is not None else {}
        module = LoRALightningModule.load_from_checkpoint(source, trust_remote_code=trust_remote_code, **options)
        assert module.model is not None
        model, base = module.model, module.base
    else:
        if Path(source).resolve() == Path(output).resolve():
            raise ValueError(f"output {output} is the adapter itself: give another folder")
        from lit_lora.adapters.trained_on import forget_note, note_quantization
        from lit_lora.models import load_base_model
        from lit_lora.tools.adapter_folder import base_of_adapter, trained_on, warn_of_another_base

        if base is None:
            base = base_of_adapter(source)
        else:
            warn_of_another_base(source, base)
        trained = trained_on(source)
        model = load_base_model(base, device="cpu", trust_remote_code=trust_remote_code)
        load_adapter(model, source)
        forget_note(model)  # that this base is unquantized says nothing about the training
        if trained.source:
            note_quantization(model, trained.quantization)
    folder = save_adapter(model, output, base_model_name=base, portable=portable)
    print(f"adapter for {base} in {folder}")
    return folder
