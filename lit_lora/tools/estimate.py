"""``lit-lora estimate``: what the training step of a ``fit`` would take, and whether that fits."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from typing import Any


def estimate(arguments: list[str]) -> None:
    """Trace the training step of the ``fit`` with these arguments, and print what it takes.

    Takes what ``lit-lora fit`` takes, and the options of :func:`_options`. Exits with 1 for "does not fit".
    """
    parser = _options()
    options, fit_arguments = parser.parse_known_args(arguments)
    own = [flag for action in parser._actions for flag in action.option_strings]
    for flag in fit_arguments:
        if flag.startswith("--") and (close := difflib.get_close_matches(flag.partition("=")[0], own, n=1, cutoff=0.8)):
            parser.error(f"no option {flag}, did you mean {close[0]}?")
    from lit_lora.amounts import parse_bytes
    from lit_lora.cli import parse_fit
    from lit_lora.memory import suggest, trace

    if options.fits is not None:
        parse_bytes(options.fits)
    config = parse_fit(fit_arguments)
    settings = step_settings(config, device=options.device, lengths=options.lengths)
    found = trace(settings)
    print(found)
    if config.model.get("optimizer") is not None:
        print("traced with AdamW: the state of another optimizer is not known")
    if config.model.activation_memory is not None:
        print("traced without model.activation_memory, which recomputes as many layers as its budget needs")
    if config.model.compile_layers or config.model.liger:
        print("traced without model.compile_layers and model.liger: what compiled layers and Liger keep is not known")
    fits = options.fits is None or found.fits(options.fits)
    if options.fits is not None:
        print(f"\nfits in {options.fits}: {'yes' if fits else 'no'}")
    if options.suggest or not fits:
        print("\nto take less (tracing each change, about as long as the estimate took):", flush=True)
        for suggestion in suggest(found, options.fits):
            enough = options.fits is not None and suggestion.estimate.fits(options.fits)
            print(f"  {suggestion}{' (fits)' if enough else ''}")
    if not fits:
        sys.exit(1)


def step_settings(config: Any, *, device: str | None = None, lengths: list[int] | None = None) -> Any:
    """The settings of the largest step that the data settings of a ``fit`` allow.

    Args:
        config: the parsed settings of a ``fit``.
        device: "cpu" or "cuda"; by default what ``trainer.accelerator`` asks for.
        lengths: tokens of each example, where the largest batch is not the one to look at.
    """
    import torch

    from lit_lora.config import LoRAConfig, QuantizationConfig
    from lit_lora.memory import StepSettings

    model, trainer = config.model, config.trainer
    if device is None:
        accelerator = str(trainer.accelerator)
        cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
        device = "cuda" if cuda else "cpu"
    lora, dtype, autocast = _built(LoRAConfig, model.lora), model.dtype, None
    precision = str(trainer.precision or "32-true")
    half = "bfloat16" if precision.startswith("bf16") else "float16" if precision.startswith("16") else None
    if half and precision.endswith("true"):
        lora, dtype = dataclasses.replace(lora, adapter_dtype=half), half
    elif half:
        autocast = half
    return StepSettings(
        base=model.base,
        lora=lora,
        lengths=tuple(lengths or largest_batch(config.data)),
        quantization=None if model.quantization is None else _built(QuantizationConfig, model.quantization),
        dtype=dtype,
        device=device,  # type: ignore[arg-type]
        gradient_checkpointing=model.gradient_checkpointing,
        packing=model.packing and config.data.packing,
        chunked_loss=model.chunked_loss,
        fused_lora=model.fused_lora,
        recompute_mlp=model.recompute_mlp,
        accumulate_grad_batches=trainer.accumulate_grad_batches or 1,
        autocast=autocast,  # type: ignore[arg-type]
        trust_remote_code=model.trust_remote_code,
    )


def largest_batch(data: Any) -> list[int]:
    """Lengths of the examples of the largest micro-batch that the data settings allow."""
    from lit_lora.data.datamodule import DEFAULT_BATCH_SIZE

    longest, count, most = data.max_length, data.batch_size, data.max_tokens_per_batch
    if most is None:
        return [longest] * (count or DEFAULT_BATCH_SIZE)
    whole, rest = divmod(most, longest)
    lengths = [longest] * whole + ([rest] if rest >= 2 else [])
    return lengths[:count] or [longest]


def _built(kind: Any, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    fields = value.as_dict() if hasattr(value, "as_dict") else dict(value)
    return kind(**fields.get("init_args", fields))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-lora estimate",
        allow_abbrev=False,
        description="Predict the peak memory of a training step, by tracing one with tensors that have no memory.",
        epilog="All other arguments are those of lit-lora fit, and mean the same: --config FILE, --model.lora.r 16 ...",
    )
    parser.add_argument("--fits", metavar="AMOUNT", help='does it fit, in for example "12GB"? Exits with 1 if not')
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default what trainer.accelerator asks for")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="TOKENS", help="of each example in a micro-batch")
    parser.add_argument("--suggest", action="store_true", help="say what would lower the peak, and to how much")
    return parser
