"""``lit-lora init``: a config for ``fit``, from a model, a data file and the memory that there is.

Nothing is guessed that can be looked at: lengths, formats and batches come from ``lit-lora data``, and what fits from
``lit-lora estimate``. What cannot be looked at before a run, rates and ranks, comes from what others have measured
(``starting_values.py``), and the file says so.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_lora.cli.command_line import options, settings, with_flag_values
from lit_lora.cli.commented_config import Choice, commented
from lit_lora.cli.setting_check import refuse
from lit_lora.cli.short_names import FLAGS, as_for_fit
from lit_lora.kernels.cpu_features import multiplies_bfloat16
from lit_lora.tools.starting_values import accumulation, adapter_choices, data_choices, run_choices

if TYPE_CHECKING:
    from lit_lora.data.look.report import DataReport
    from lit_lora.memory.estimate import MemoryEstimate

OPTIONS = ("memory", "device", "output", "overwrite", "help")
"""Beside those of ``fit``."""

_BATCH = ("data.batch_size", "data.max_tokens_per_batch")
_HALF = "half of the base's memory: in float32, the default on this CPU, no step fits"
_FOUR = "QLoRA: with 16 bits a weight no step fits, however small its batch"
_EIGHT = "the embedding and the head too: with them in 16 bits no step fits"
_AGAIN = "without it no step fits; a third more time, the same result"


class _Variant(NamedTuple):
    """How a step is made to fit: the settings of it, and what it takes."""

    choices: list[Choice]
    estimate: MemoryEstimate
    num_examples: int
    num_batches: int
    """Both of an epoch."""
    accumulated: int
    """Micro-batches of a step, which decides whether gradients are kept while the next one runs."""


def init(arguments: list[str]) -> Path:
    """Look at the data, trace what fits, and write a config that ``lit-lora fit`` takes as it is.

    Returns:
        The file.
    """
    given = options(with_flag_values(arguments, {*FLAGS, "--overwrite"}))
    own = [token for option in given if option.key in OPTIONS for token in option.tokens]
    chosen = own_options().parse_args([*own, *(option.tokens[0] for option in given if not option.key)])
    fit_arguments = as_for_fit([option for option in given if option.key and option.key not in OPTIONS], OPTIONS)
    if chosen.file is not None:
        fit_arguments.append(f"--data.train={chosen.file}")
    output = Path(chosen.output)
    as_given = _checked(fit_arguments, output, chosen.overwrite == "true")

    from lit_lora.cli.lightning_cli import parse_fit
    from lit_lora.wording import for_command_line

    with for_command_line():
        config = parse_fit(fit_arguments)
        device, budget = _device(config, chosen.device), chosen.memory
        limit, limit_words = _limit(budget, device)
        report = _looked_at(config)
        first = [*data_choices(report, as_given), *adapter_choices(config, as_given)]
        fitting = _fitting(fit_arguments, as_given, first, config, device, limit, limit_words)
    counts = fitting.num_examples, fitting.num_batches, fitting.accumulated
    run = run_choices(report, as_given, *counts, budget=budget, device=device)
    text = commented(
        _in_order([*run, *(Choice(*item) for item in as_given.items()), *first, *fitting.choices], chosen.device),
        _header(arguments, output, report, fitting, limit_words, device),
    )
    _write(output, text)
    return output


def _checked(fit_arguments: list[str], output: Path, overwrite: bool) -> dict[str, Any]:
    """The settings that were given, by key; mistakes are reported before any long work."""
    problems: list[str] = []
    given = {entry.key: entry.value for entry in settings(fit_arguments, set(), problems) if entry.key != "config"}
    if any(option.key == "config" for option in options(fit_arguments)):
        problems.append("--config: init writes a config, and takes settings as options: --model.lora.r 32")
    problems += [
        f"--{key}: init writes whole settings; add to a list in the file, afterwards" for key in given if "+" in key
    ]
    if "data.train" not in given:
        problems.append("missing: FILE, the data to train on (see lit-lora init --help)")
    if "model.base" not in given:
        problems.append("missing: --model MODEL, the base to train (see lit-lora init --help)")
    if output.is_dir():
        problems.append(f"--output {output} is a folder: give the name of a file to write")
    elif output.suffix not in (".yaml", ".yml"):
        problems.append(f"--output {output}: expected the name of a .yaml file")
    elif output.exists() and not overwrite:
        problems.append(f"{output} is there already: --overwrite replaces it, --output FILE writes another")
    if problems:
        refuse(problems)
    return given


def _looked_at(config: Any) -> DataReport:
    from lit_lora.cli.progress import Counting
    from lit_lora.data.look.inspection import inspect_data
    from lit_lora.tools.data import given_data

    data, model = given_data(config.data), config.model
    with Counting() as progress:
        report = inspect_data(
            data.pop("train"), model.base, examples=0, revision=model.revision,
            trust_remote_code=model.trust_remote_code, progress=progress, **data,
        )  # fmt: skip
    look = f"look at it with: lit-lora data {config.data.train} --model {model.base}"
    if any(source.pairs is not None for source in report.sources):
        raise ValueError(report.warnings[0])
    if report.lengths is None or (report.num_problems and config.data.on_bad_rows == "error"):
        kind = next(kind for source in report.sources for kind in source.problems)
        drop = "" if report.lengths is None else ", or leave them out with --on_bad_rows drop"
        raise ValueError(f"{report.num_problems:,} rows of the data cannot be used ({kind.message}): {look}{drop}")
    return report


def _device(config: Any, asked: str | None) -> str:
    import torch

    if asked is not None:
        return asked
    accelerator = str(config.trainer.accelerator)
    return "cuda" if accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available()) else "cpu"


def _limit(memory: str | None, device: str) -> tuple[int, str]:
    """Bytes that a step may take, and where that comes from."""
    import torch

    from lit_lora.config import parse_bytes
    from lit_lora.memory.activation_budget import budget_bytes

    if memory is not None:
        return parse_bytes(memory), memory
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU here whose memory could be looked at: say how much it has, --memory 24GB")
    free = budget_bytes("auto", torch.device(device), 0)
    return free, f"the {free / 1e9:.1f} GB that were free on this machine, but for a tenth"


def _fitting(
    fit_arguments: list[str],
    as_given: dict[str, Any],
    first: list[Choice],
    config: Any,
    device: str,
    limit: int,
    limit_words: str,
) -> _Variant:
    """The first way to hold and run the model that stays within the limit: the same result in less time first."""
    from lit_lora.cli.lightning_cli import parse_fit
    from lit_lora.memory.suggest import suggest
    from lit_lora.tools.estimate import planned_batches, traced

    def tried(*groups: list[Choice]) -> _Variant:
        changed = [choice for group in groups for choice in group]
        parsed = parse_fit([*fit_arguments, *(f"--{choice.key}={choice.value}" for choice in [*first, *changed])])
        batches = planned_batches(parsed)
        counts = batches.num_examples, batches.num_batches
        if "trainer.accumulate_grad_batches" not in as_given:
            parsed.trainer.accumulate_grad_batches = accumulation(*counts)
        estimate = traced(parsed, batches, device=device)
        return _Variant(changed, estimate, *counts, parsed.trainer.accumulate_grad_batches)

    sizes, steps = list(_sizes(first)), list(_steps(as_given))
    smallest: _Variant | None = None
    for held in _ways_to_hold(config, as_given, device):
        smallest = tried(held, sizes[-1], steps[-1])
        if not smallest.estimate.fits(limit):
            continue
        for step in steps:
            for size in sizes:
                variant = tried(held, size, step)
                if variant.estimate.fits(limit):
                    return variant
    assert smallest is not None
    further = [str(s) for s in suggest(smallest.estimate) if "lora_sharded" not in s.change]
    raise ValueError(
        f"no step of {config.model.base} on this data fits in {limit_words}: the smallest that init knows takes "
        f"{smallest.estimate.peak_bytes / 1e6:,.0f} MB ({', '.join(_words(smallest.choices)) or 'as it is'}). "
        f"It would take less with {'; '.join(further) or 'a smaller base'}"
    )


def _words(choices: list[Choice]) -> list[str]:
    return [f"{choice.key} {str(choice.value).lower()}" for choice in choices]


def _ways_to_hold(config: Any, as_given: dict[str, Any], device: str) -> Iterator[list[Choice]]:
    """The base in as many bits as can be: none of them is varied where it was given, or where it is quantized."""
    from lit_lora.base.load import load_config

    yield []
    model = config.model
    stored = load_config(model.base, revision=model.revision, trust_remote_code=model.trust_remote_code)
    if any(key.startswith("model.quantization") for key in as_given) or hasattr(stored, "quantization_config"):
        return
    if device == "cpu" and "model.dtype" not in as_given and not multiplies_bfloat16():
        yield [Choice("model.dtype", "bfloat16", _HALF)]
    bits = Choice("model.quantization.bits", 4, _FOUR)
    yield [bits]
    yield [bits, Choice("model.quantization.embedding_bits", 8, _EIGHT)]


def _sizes(first: list[Choice]) -> Iterator[list[Choice]]:
    """Micro-batches, from the usual one on, each half of the one before."""
    values = {choice.key: choice.value for choice in first}
    usual = next((choice for choice in first if choice.key in _BATCH), None)
    yield []
    if usual is None:
        return
    least = 1 if usual.key == _BATCH[0] else values.get("data.max_length", usual.value)
    size = usual.value // 2
    while size >= least:
        yield [Choice(usual.key, size, f"{usual.value:,} would not fit")]
        size //= 2


def _steps(as_given: dict[str, Any]) -> Iterator[list[Choice]]:
    yield []
    if not any(key in as_given for key in ("model.step", "model.step.recompute")):
        yield [Choice("model.step.recompute", True, _AGAIN)]


def _in_order(choices: list[Choice], device: str | None) -> list[Choice]:
    """Each setting once, the last that was chosen; trainer, model, data, then the rest."""
    kept = {choice.key: choice for choice in choices}
    if device is not None and "trainer.accelerator" not in kept:
        kept["trainer.accelerator"] = Choice("trainer.accelerator", "gpu" if device == "cuda" else "cpu")
    groups = ["trainer", "model", "data"]
    place = {key: groups.index(key.split(".")[0]) if key.split(".")[0] in groups else len(groups) for key in kept}
    return sorted(kept.values(), key=lambda choice: (place[choice.key], choice.key != "model.base"))


def _header(
    arguments: list[str], output: Path, report: DataReport, fitting: _Variant, limit_words: str, device: str
) -> list[str]:
    lengths = report.lengths
    assert lengths is not None
    formats = ", ".join(sorted({source.format for source in report.sources}))
    return [
        f"Written by: lit-lora init {shlex.join(arguments)}",
        f"Train with: lit-lora fit --config {output}",
        f"Data: {fitting.num_examples:,} examples of {formats} in an epoch, {lengths.shortest:,} to "
        f"{lengths.longest:,} tokens each, median {lengths.median:,}.",
        f"Memory of a step on {device}: {fitting.estimate.peak_bytes / 1e6:,.0f} MB at its peak, within {limit_words} "
        "(traced; what the interpreter and its libraries take is not counted).",
    ]  # fmt: skip


def _write(output: Path, text: str) -> None:
    from lit_lora.files.atomic import atomic_text

    atomic_text(output, text)
    print(text, end="")
    print(f"wrote {output}", file=sys.stderr)


def own_options() -> argparse.ArgumentParser:
    """Those that ``fit`` does not have."""
    parser = argparse.ArgumentParser(
        prog="lit-lora init",
        usage="lit-lora init FILE --model MODEL [--memory AMOUNT] [options]",
        allow_abbrev=False,
        description="Write a config for lit-lora fit, with the reason of each setting in a comment: looks at the data, "
        "and traces steps until one fits into the memory. Of the model only config and tokenizer are loaded.",
        epilog="All other arguments are those of lit-lora fit: they are written as they are given, and the rest is "
        "chosen around them. Settings of the data may leave out data. before their name, as in lit-lora data.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="data that fit takes as data.train")
    parser.add_argument(
        "--memory", metavar="AMOUNT", help='that a step may take, as "8GB"; by default what is free on the device'
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="that the run is for; by default this machine's")
    parser.add_argument("--output", metavar="FILE", default="fit.yaml", help="to write (fit.yaml)")
    parser.add_argument(
        "--overwrite", choices=["true", "false"], default="false", help="write the file although it is there"
    )
    return parser
