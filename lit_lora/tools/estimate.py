"""``lit-lora estimate``: what the training step of a ``fit`` would take, and whether that fits."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_lora.files.meant import closest, did_you_mean

if TYPE_CHECKING:
    from lit_lora.memory.estimate import MemoryEstimate

_MOST_EPOCHS = 10
OPTIONS = ("--fits", "--device", "--devices", "--lengths", "--suggest", "--help")
"""Beside those of ``fit``."""
SHARDED = "lora_sharded"
OFFLOADED = "lora_sharded_cpu_offload"


def estimate(arguments: list[str]) -> None:
    """Trace the training step of the ``fit`` with these arguments, and print what it takes.

    Takes what ``lit-lora fit`` takes, and the options of :func:`own_options`. Exits with 1 for "does not fit".
    """
    parser = own_options()
    options, fit_arguments = parser.parse_known_args(arguments)
    for flag in fit_arguments:
        if flag.startswith("--") and (close := closest(flag.partition("=")[0], OPTIONS, cutoff=0.8)):
            parser.error(f"no option {flag}, {did_you_mean(close)}")
    from lit_lora.cli.lightning_cli import parse_fit
    from lit_lora.config import parse_bytes
    from lit_lora.memory.estimate import trace
    from lit_lora.memory.suggest import suggest

    if options.fits is not None:
        parse_bytes(options.fits)
    config = parse_fit(fit_arguments)
    batches = largest_batches(config) if options.lengths is None else given_batch(options.lengths)
    found = traced(config, batches, device=options.device)
    print(f"{batches.origin}\n{found}")
    count, divided, offloaded = processes(config, options.devices)
    if count > 1 or offloaded:
        shared = trace(dataclasses.replace(found.settings, devices=count, cpu_offload=offloaded))
        first, name = (
            f"the first of {count} processes" if count > 1 else "one process",
            OFFLOADED if offloaded else SHARDED,
        )
        print(f"\nof {first}, with trainer.strategy {name}:\n{shared}")
        found = shared if divided else found
    if config.model.get("optimizer") is not None:
        print("traced with AdamW: the state of another optimizer is not known")
    step = found.settings.step
    if step.activation_budget is not None:
        print(
            f"traced without recomputing: model.step.recompute {step.recompute} recomputes as many layers as it needs"
        )
    if step.compile_layers or step.liger:
        print("traced without compile_layers and liger of model.step: what compiled layers and Liger keep is not known")
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


def traced(config: Any, batches: LargestBatches, *, device: str | None = None) -> MemoryEstimate:
    """What a step of a ``fit`` takes, in the layout that its model runs in.

    Args:
        config: the parsed settings of a ``fit``.
        batches: its largest micro-batches.
        device: as for :func:`step_settings`.
    """
    from lit_lora.memory.estimate import trace

    found = trace(step_settings(config, batches.packed, device=device))
    if not found.path.packed and batches.padded != batches.packed:
        found = trace(step_settings(config, batches.padded, device=device))
    return found


class Processes(NamedTuple):
    """What a ``fit`` runs in."""

    num_processes: int
    divided: bool
    """Whether they divide the base."""
    offloaded: bool
    """Whether their shares lie in the memory of the host."""


def processes(config: Any, devices: int | None) -> Processes:
    """How many processes a ``fit`` has, as far as its settings tell, and how they hold the base.

    Args:
        config: the parsed settings of a ``fit``.
        devices: as asked for; None for those of the settings.
    """
    strategy = config.trainer.strategy
    if isinstance(strategy, str):
        divided, offloaded = strategy in (SHARDED, OFFLOADED), strategy == OFFLOADED
    else:
        divided = strategy is not None and strategy.class_path.endswith("LoRAShardedStrategy")
        offloaded = divided and bool((strategy.get("init_args") or {}).get("cpu_offload"))
    given = config.trainer.devices
    count = int(given) if str(given).isdecimal() else len(given) if isinstance(given, list) else 1
    return Processes(devices or (count * config.trainer.num_nodes if divided else 1), divided, offloaded)


class Batch(NamedTuple):
    """Sizes of a micro-batch."""

    lengths: tuple[int, ...]
    """Tokens of each example."""
    supervised: float
    """Share of the tokens that the loss counts."""


class LargestBatches(NamedTuple):
    """The micro-batch that needs most memory, in either layout."""

    packed: Batch
    padded: Batch
    origin: str
    """Where they come from, in words."""
    num_examples: int = 0
    """In an epoch of the data; 0 where it could not be read."""
    num_batches: int = 0
    """Micro-batches in it."""


def given_batch(lengths: Sequence[int]) -> LargestBatches:
    """One of examples with these lengths."""
    batch = Batch(tuple(lengths), 1.0)
    return LargestBatches(batch, batch, "a micro-batch of the given lengths, every token supervised")


def largest_batches(config: Any) -> LargestBatches:
    """Those of the run's own plan over its data; where that cannot be read, the largest that the settings allow."""
    try:
        return planned_batches(config)
    except (OSError, ValueError) as error:
        batch = Batch(tuple(_largest_allowed(config.data)), 1.0)
        reason = str(error).splitlines()[0].removesuffix(":")
        origin = f"assumed the largest micro-batch that the settings allow: the data could not be read ({reason})"
        return LargestBatches(batch, batch, origin)


def planned_batches(config: Any) -> LargestBatches:
    """Those of the run's own plan over its data.

    Raises:
        OSError: if the data cannot be read.
        ValueError: if it cannot be trained on.
    """
    return _largest_planned(*_training_data(config), config)


def _training_data(config: Any) -> tuple[Any, Any, Any]:
    from lit_lora.base.load import load_tokenizer
    from lit_lora.cli.lightning_cli import plain
    from lit_lora.data.datamodule import SFTDataModule

    data, model = {name: plain(value) for name, value in config.data.items()}, config.model
    name, revision = data["tokenizer"], None
    if name is None:
        name, revision = model.base, model.revision
    data["tokenizer"] = load_tokenizer(name, revision=revision, trust_remote_code=model.trust_remote_code)
    module = SFTDataModule(**data)
    module.setup("validate")  # what fit does, without a summary of it
    assert module.train_data is not None
    return module.train_data, module.batch_settings, module.mixture


def _largest_planned(examples: Any, settings: Any, mixture: Any, config: Any) -> LargestBatches:
    from lit_lora.data.batches.sampler import plan_batches

    kept, supervised = examples.lengths, examples.supervised  # what follows the last supervised token is not kept
    first = plan_batches(examples.lengths, settings, mixture=mixture)
    plan = [*first]
    for epoch in range(1, _num_epochs(config, len(first)) if settings.shuffle else 1):
        plan += plan_batches(examples.lengths, settings, epoch, mixture)

    def largest(cost: Callable[[Any], int]) -> Batch:
        batch = max(plan, key=lambda batch: cost(kept[batch]))
        lengths = tuple(int(length) for length in kept[batch])
        return Batch(lengths, float(supervised[batch].sum()) / max(1, sum(lengths) - len(lengths)))

    packed, padded = largest(lambda lengths: lengths.sum()), largest(lambda lengths: lengths.max() * len(lengths))
    origin = f"the largest of {len(plan)} micro-batches of {len(examples)} examples in {config.data.train}"
    return LargestBatches(packed, padded, origin, sum(map(len, first)), len(first))


def step_settings(config: Any, batch: Batch, *, device: str | None = None) -> Any:
    """The settings of a training step of a ``fit``.

    Args:
        config: the parsed settings of a ``fit``.
        batch: its micro-batch.
        device: "cpu" or "cuda"; by default what ``trainer.accelerator`` asks for.
    """
    import torch

    from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig
    from lit_lora.memory.traced_step import StepSettings
    from lit_lora.starting_adapter import starting_adapter

    model, trainer = config.model, config.trainer
    if device is None:
        accelerator = str(trainer.accelerator)
        cuda = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
        device = "cuda" if cuda else "cpu"
    lora, dtype, autocast, adapter = _built(LoRAConfig, model.lora), model.dtype, None, None
    if model.adapter is not None:
        start = starting_adapter(model.adapter, lora)
        lora, adapter = start.lora, start.stored
    precision = str(trainer.precision or "32-true")
    half = "bfloat16" if precision.startswith("bf16") else "float16" if precision.startswith("16") else None
    if half and precision.endswith("true"):
        lora, dtype = dataclasses.replace(lora, adapter_dtype=half), half
    elif half:
        autocast = half
    return StepSettings(
        base=model.base,
        lora=lora,
        lengths=batch.lengths,
        adapter=adapter,
        quantization=None if model.quantization is None else _built(QuantizationConfig, model.quantization),
        dtype=dtype,
        device=device,  # type: ignore[arg-type]
        step=_built(StepConfig, model.step),
        packing=config.data.packing,
        supervised=batch.supervised,
        accumulate_grad_batches=trainer.accumulate_grad_batches or 1,
        autocast=autocast,  # type: ignore[arg-type]
        trust_remote_code=model.trust_remote_code,
    )


def _num_epochs(config: Any, num_batches: int) -> int:
    """Epochs that the run begins; at most ten, since their largest batches are alike."""
    trainer = config.trainer
    steps = trainer.max_steps * (trainer.accumulate_grad_batches or 1) if trainer.max_steps > 0 else 0
    epochs = trainer.max_epochs if (trainer.max_epochs or 0) > 0 else _MOST_EPOCHS
    return min(_MOST_EPOCHS, epochs, -(-steps // num_batches) if steps else epochs)


def _largest_allowed(data: Any) -> list[int]:
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


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected a number of at least 2, got {text!r}")
    return int(text)


def own_options() -> argparse.ArgumentParser:
    """Those that ``fit`` does not have."""
    parser = argparse.ArgumentParser(
        prog="lit-lora estimate",
        allow_abbrev=False,
        description="Predict the peak memory of a training step, by tracing one with tensors that have no memory.",
        epilog="All other arguments are those of lit-lora fit, and mean the same: --config FILE, --model.lora.r 16 ...",
    )
    parser.add_argument("--fits", metavar="AMOUNT", help='does it fit, in for example "12GB"? Exits with 1 if not')
    parser.add_argument(
        "--devices", type=_at_least_two, metavar="N", help="also the peak of each of N processes that divide the base"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default what trainer.accelerator asks for")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="TOKENS",
        help="of each example in a micro-batch; by default the largest micro-batch of the run's own data is looked for",
    )  # fmt: skip
    parser.add_argument("--suggest", action="store_true", help="say what would lower the peak, and to how much")
    return parser
