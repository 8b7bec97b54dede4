"""``lit-lora sweep``: a ``fit`` for each combination of some settings, and all of them side by side.

Each is an ordinary run in a process and a folder of its own, so that it can be looked at, verified and resumed by
itself. Sent again, a sweep goes on: a finished run says what it said, and a stopped one takes the steps that are left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from yaml import YAMLError

from lit_lora.cli.command_line import options
from lit_lora.cli.setting_check import refuse
from lit_lora.files import strict_yaml
from lit_lora.files.atomic import atomic_write
from lit_lora.metrics import FILE_NAME, TrainingMetrics

if TYPE_CHECKING:
    from lit_lora.report.outcome import Outcome

RECORD = "sweep.json"
PAGE = "report.html"
MOST_RUNS = 1000
TAKEN = ("trainer.default_root_dir", "ckpt_path", "checkpoint.dirpath", "export.folder", "export.best_folder")
"""Settings that the sweep gives to each of its runs, or that would let one write over another."""


class _Run(NamedTuple):
    """One combination."""

    name: str
    values: dict[str, Any]
    root: Path
    """Its ``trainer.default_root_dir``."""

    def arguments(self) -> list[str]:
        """Of ``fit``, behind those that all runs have."""
        given = [f"--{key}={_text(value)}" for key, value in self.values.items()]
        return [*given, f"--trainer.default_root_dir={self.root}"]


class _Result(NamedTuple):
    """What became of a run."""

    run: _Run
    said: str
    """Its verdict, or how it failed."""
    folder: Path | None
    loss: float
    validation_loss: float
    """Both of the last step or validation; NaN where there is none."""


def sweep(arguments: list[str]) -> Path:
    """Train with each combination of values, skip what is finished, and compare.

    Returns:
        The page that compares them.

    Raises:
        RuntimeError: after all others have run, if a run ended with an error.
    """
    given = options(arguments)
    own = [token for option in given if option.key in ("output", "help") for token in option.tokens]
    chosen = _own_options().parse_args([*own, *(option.tokens[0] for option in given if not option.key)])
    fit_arguments = [
        token for option in given if option.key and option.key not in ("output", "help") for token in option.tokens
    ]
    output = Path(chosen.output)
    values = _values(chosen.values, {option.setting for option in given})
    runs = list(_runs(values, output))
    _check(fit_arguments, runs)
    _claim(output, {"arguments": fit_arguments, "values": values})

    results = [_train(run, fit_arguments, f"{number} of {len(runs)}") for number, run in enumerate(runs, 1)]
    results.sort(key=lambda result: [math.inf if math.isnan(x) else x for x in (result.validation_loss, result.loss)])
    print(_table(results))
    shown = [str(result.folder) for result in results if result.folder is not None]
    page = output / PAGE
    if shown:
        from lit_lora.report.page import write_report

        write_report(shown, page)
        print(f"\nreport written to {page}")
    if failed := [result.run.name for result in results if result.said.startswith("failed")]:
        raise RuntimeError(f"{len(failed)} of {len(runs)} runs ended with an error: {', '.join(failed)}; see above")
    return page


def _values(words: Sequence[str], also_given: set[str]) -> dict[str, list[Any]]:
    """The values of each setting that varies; mistakes end the program."""
    found: dict[str, list[Any]] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        try:
            listed = strict_yaml.parse(text if text.startswith("[") else f"[{text}]") if equals else None
        except YAMLError as error:
            problems.append(f"{word}: not a list of values ({strict_yaml.reason(error)})")
            continue
        if not isinstance(listed, list) or not listed:
            problems.append(f"{word}: expected a setting and its values, as in model.lora.r=4,8,16")
        elif key in TAKEN:
            problems.append(f"{key}: the runs of a sweep have folders of their own, below --output")
        elif key in found or key in also_given:
            problems.append(f"{key} is given twice")
        elif len({_text(value) for value in listed}) < len(listed):
            problems.append(f"{word}: a value stands there twice")
        else:
            found[key] = listed
    problems += [f"--{key}: the runs of a sweep have folders of their own, below --output"
                 for key in TAKEN if key in also_given]  # fmt: skip
    if not words:
        problems.append("nothing varies: name settings and their values, as in model.lora.r=4,8,16")
    if (count := math.prod(map(len, found.values()))) > MOST_RUNS:
        problems.append(f"{count:,} runs: no more than {MOST_RUNS:,} make one sweep")
    if problems:
        refuse(problems)
    return found


def _runs(values: Mapping[str, Sequence[Any]], output: Path) -> Iterator[_Run]:
    last_parts = [key.rpartition(".")[2] for key in values]
    short = {key: last if last_parts.count(last) == 1 else key for key, last in zip(values, last_parts, strict=True)}
    for number, combination in enumerate(itertools.product(*values.values()), 1):
        set_to = dict(zip(values, combination, strict=True))
        name = ",".join(f"{short[key]}={_text(value)}" for key, value in set_to.items())
        folder = re.sub(r"[^\w.,=+-]+", "_", f"{number:02d},{name}")[:100]
        yield _Run(name, set_to, output / folder)


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _check(fit_arguments: Sequence[str], runs: Sequence[_Run]) -> None:
    """Read the settings of all runs, before the first of them: a mistake in one ends the program as in ``fit``."""
    from lit_lora.cli.lightning_cli import parse_fit
    from lit_lora.wording import for_command_line

    with for_command_line():
        for run in runs:
            parse_fit([*fit_arguments, *run.arguments()])


def _claim(output: Path, content: Mapping[str, Any]) -> None:
    """Note in the folder which sweep it holds.

    Raises:
        ValueError: if it holds another one.
    """
    path, text = output / RECORD, json.dumps(content, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{output} holds a sweep of other settings (see {path}): give --output another folder")
    output.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(text.encode()))


def _train(run: _Run, fit_arguments: Sequence[str], place: str) -> _Result:
    from lit_lora.runs.run_folder import run_folders

    if (found := _finished(run)) is None:
        print(f"=== run {place}: {run.name}", flush=True)
        command = [sys.executable, "-m", "lit_lora", "fit", *fit_arguments, *run.arguments(), "--ckpt_path=last"]
        code = subprocess.run(command, check=False).returncode
        if code in (130, 143):
            raise KeyboardInterrupt  # it was stopped, and so is the sweep
        found = _finished(run)
        if found is None or code not in (0, 3):
            begun = [folder for folder in run_folders(run.root) if (folder / FILE_NAME).exists()]
            return _result(run, f"failed (exit code {code})", begun[-1] if begun else None)
    else:
        print(f"=== run {place}: {run.name} is there: {found[1].result}", flush=True)
    folder, outcome = found
    return _result(run, outcome.result, folder)


def _finished(run: _Run) -> tuple[Path, Outcome] | None:
    """The folder of a run that has come to its end, and what it says."""
    from lit_lora.report.outcome import read_outcome
    from lit_lora.runs.run_folder import run_folders

    outcomes = [(folder, read_outcome(folder)) for folder in run_folders(run.root)]
    return next(((folder, found) for folder, found in outcomes if found is not None and found.finished), None)


def _result(run: _Run, said: str, folder: Path | None) -> _Result:
    metrics = TrainingMetrics.load(folder / FILE_NAME) if folder is not None else TrainingMetrics()
    validated = metrics.validation_losses.get("", [math.nan])
    return _Result(run, said, folder, metrics.steps[-1].loss if metrics.steps else math.nan, validated[-1])


def _table(results: Sequence[_Result]) -> str:
    """The best first."""
    width = max(len(result.run.name) for result in results)
    lines = [f"\n{'':<{width}}  validation loss      loss  verdict"]
    lines += [
        f"{result.run.name:<{width}}  {_shown(result.validation_loss):>15}  {_shown(result.loss):>8}  {result.said}"
        for result in results
    ]
    return "\n".join(lines)


def _shown(loss: float) -> str:
    return "" if math.isnan(loss) else f"{loss:.4f}"


def _own_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lit-lora sweep",
        usage="lit-lora sweep SETTING=VALUE,VALUE,... [SETTING=...] [--output FOLDER] [options of fit]",
        allow_abbrev=False,
        description="Train once for each combination of values, each in a folder of its own, and compare. Sent again, "
        "it goes on where it was stopped.",
        epilog="All other arguments are those of lit-lora fit, for all runs. A value that is a list stands in "
        "brackets: model.lora.target_modules=[all-linear,[q_proj,v_proj]].",
    )
    parser.add_argument("values", metavar="SETTING=VALUE,...", nargs="*", help="as model.lora.r=4,8,16")
    parser.add_argument("--output", metavar="FOLDER", default="runs/sweep", help="of the runs (runs/sweep)")
    return parser
