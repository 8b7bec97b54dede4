"""``lit-lora sweep``: a ``fit`` for each combination of some settings, and all of them side by side.

With ``--trials`` it is no grid but a search: the values of each run follow from how those before it ended.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from yaml import YAMLError

from lit_lora.cli.command_line import options
from lit_lora.cli.setting_check import refuse
from lit_lora.files import strict_yaml
from lit_lora.files.atomic import atomic_write
from lit_lora.metrics import FILE_NAME, TrainingMetrics
from lit_lora.runs.trials import Range, Trial, check_installed, next_values, read_range

if TYPE_CHECKING:
    from lit_lora.report.outcome import Outcome

RECORD = "sweep.json"
TRIALS = "trials.json"
PAGE = "report.html"
OWN = ("output", "trials", "seed", "help")
"""Options that are not those of ``fit``."""

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

    @property
    def objective(self) -> float:
        """What a search makes small; NaN if the run failed."""
        if self.said.startswith("failed"):
            return math.nan
        return self.loss if math.isnan(self.validation_loss) else self.validation_loss


def sweep(arguments: list[str]) -> Path:
    """Train with each combination of values, skip what is finished, and compare.

    Returns:
        The page that compares them.

    Raises:
        RuntimeError: after all others have run, if a run ended with an error.
        ValueError: if the folder holds another sweep, or this one is going on.
    """
    given = options(arguments)
    own = [token for option in given if option.key in OWN for token in option.tokens]
    chosen = own_options().parse_args([*own, *(option.tokens[0] for option in given if not option.key)])
    fit_arguments = [token for option in given if option.key and option.key not in OWN for token in option.tokens]
    output = Path(chosen.output)
    space = _space(chosen.values, {option.setting for option in given}, chosen.trials, chosen.seed)
    searches = chosen.trials is not None
    if searches:
        check_installed()
    runs = list(_runs(_ends(space) if searches else itertools.product(*space.values()), space, output))
    content = {"arguments": fit_arguments, "values": _as_given(space)}
    with _claimed(output):
        _check(fit_arguments, runs)
        _note(output, {**content, "seed": chosen.seed or 0} if searches else content)
        if searches:
            results = _search(space, fit_arguments, output, chosen.trials, chosen.seed or 0)
        else:
            results = [_train(run, fit_arguments, f"{number} of {len(runs)}") for number, run in enumerate(runs, 1)]
        return _compared(results, output)


def _search(
    space: Mapping[str, Range | list[Any]], fit_arguments: Sequence[str], output: Path, num_trials: int, seed: int
) -> list[_Result]:
    """Train with values that follow from how the runs before ended; those that come again are not trained again."""
    path = output / TRIALS
    tried = [tuple(values) for values in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    results: list[_Result] = []
    for number in range(num_trials):
        if number == len(tried):
            so_far = [Trial(result.run.values, result.objective) for result in results]
            tried.append(tuple(next_values(space, so_far, seed=seed).values()))
            atomic_write(path, lambda file: file.write(json.dumps(tried, indent=1).encode()))
        if (first := tried.index(tried[number])) < number:
            results.append(results[first])
            continue
        run = next(_runs([tried[number]], space, output, start=number + 1))
        results.append(_train(run, fit_arguments, f"{number + 1} of {num_trials}"))
    return [result for number, result in enumerate(results) if tried.index(tried[number]) == number]


def _ends(space: Mapping[str, Range | list[Any]]) -> Iterator[tuple[Any, ...]]:
    """Combinations that have each end of a range and each value of a list in them."""
    most = max(len(values) for values in space.values())
    for number in range(most):
        yield tuple(values[min(number, len(values) - 1)] for values in space.values())


def _as_given(space: Mapping[str, Range | list[Any]]) -> dict[str, Any]:
    return {key: str(values) if isinstance(values, Range) else values for key, values in space.items()}


def _compared(results: list[_Result], output: Path) -> Path:
    results.sort(key=lambda result: [math.inf if math.isnan(x) else x for x in (result.validation_loss, result.loss)])
    print(_table(results))
    shown = [str(result.folder) for result in results if result.folder is not None]
    page = output / PAGE
    if shown:
        from lit_lora.report.page import write_report

        write_report(shown, page)
        print(f"\nreport written to {page}")
    if failed := [result.run.name for result in results if result.said.startswith("failed")]:
        raise RuntimeError(f"{len(failed)} of {len(results)} runs ended with an error: {', '.join(failed)}; see above")
    return page


def _space(
    words: Sequence[str], also_given: set[str], num_trials: int | None, seed: int | None
) -> dict[str, Range | list[Any]]:
    """The values of each setting that varies; mistakes end the program."""
    found: dict[str, Range | list[Any]] = {}
    problems = []
    for word in words:
        key, equals, text = word.partition("=")
        try:
            listed = read_range(text) or strict_yaml.parse(text if text.startswith("[") else f"[{text}]")
        except YAMLError as error:
            problems.append(f"{word}: not a list of values ({strict_yaml.reason(error)})")
            continue
        except ValueError as error:
            problems.append(f"{key}={error}")
            continue
        if not equals or not isinstance(listed, Range | list) or not listed:
            problems.append(f"{word}: expected a setting and its values, as in model.lora.r=4,8,16")
        elif key in TAKEN:
            problems.append(f"{key}: the runs of a sweep have folders of their own, below --output")
        elif key in found or key in also_given:
            problems.append(f"{key} is given twice")
        elif isinstance(listed, Range) and num_trials is None:
            problems.append(
                f"{word}: a range is searched by a number of runs: give --trials 20, or list the values to try, as in "
                f"{key}={listed.low},{listed.high}"
            )
        elif isinstance(listed, list) and len({_text(value) for value in listed}) < len(listed):
            problems.append(f"{word}: a value stands there twice")
        else:
            found[key] = listed
    problems += [f"--{key}: the runs of a sweep have folders of their own, below --output"
                 for key in TAKEN if key in also_given]  # fmt: skip
    if not words:
        problems.append("nothing varies: name settings and their values, as in model.lora.r=4,8,16")
    if num_trials is None and seed is not None:
        problems.append("--seed: only a search has one, with --trials; that of the runs is --seed_everything")
    count = math.prod(map(len, found.values())) if num_trials is None else num_trials
    if count > MOST_RUNS:
        problems.append(f"{count:,} runs: no more than {MOST_RUNS:,} make one sweep")
    if problems:
        refuse(problems)
    return found


def _runs(
    combinations: Iterable[Sequence[Any]], keys: Iterable[str], output: Path, *, start: int = 1
) -> Iterator[_Run]:
    keys = list(keys)
    last_parts = [key.rpartition(".")[2] for key in keys]
    short = {key: last if last_parts.count(last) == 1 else key for key, last in zip(keys, last_parts, strict=True)}
    for number, combination in enumerate(combinations, start):
        set_to = dict(zip(keys, combination, strict=True))
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


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """Within, no other process runs a sweep in this folder.

    Raises:
        ValueError: if one does.
    """
    from lit_lora.runs.run_folder import RunFolder

    folder = RunFolder(output, option="--output")
    if not folder.claim():
        raise ValueError(
            f"the sweep in {output} is going on ({folder.owner}): wait for its end or stop it, or give --output "
            "another folder"
        )
    try:
        yield
    finally:
        folder.release()


def _note(output: Path, content: Mapping[str, Any]) -> None:
    """Note in the folder which sweep it holds.

    Raises:
        ValueError: if it holds another one.
    """
    path, text = output / RECORD, json.dumps(content, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{output} holds a sweep of other settings (see {path}): give --output another folder")
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


def own_options() -> argparse.ArgumentParser:
    """Those that ``fit`` does not have."""
    parser = argparse.ArgumentParser(
        prog="lit-lora sweep",
        usage="lit-lora sweep SETTING=VALUE,VALUE,... [SETTING=...] [--trials N] [--output FOLDER] [options of fit]",
        allow_abbrev=False,
        description="Train once for each combination of values, each in a folder of its own, and compare. Sent again, "
        "it goes on where it was stopped. With --trials, search instead: a setting can then be a range of numbers.",
        epilog="All other arguments are those of lit-lora fit, for all runs. A value that is a list stands in "
        "brackets: model.lora.target_modules=[all-linear,[q_proj,v_proj]].",
    )
    parser.add_argument(
        "values", metavar="SETTING=VALUE,...", nargs="*",
        help="as model.lora.r=4,8,16; with --trials also as model.optimization.learning_rate=1e-5..1e-3",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", default="runs/sweep", help="of the runs (runs/sweep)")
    parser.add_argument(
        "--trials", metavar="N", type=_at_least(1),
        help="runs of a search for the lowest validation loss, else loss (Optuna's TPE: pip install 'lit-lora[sweep]')",
    )  # fmt: skip
    parser.add_argument("--seed", metavar="NUMBER", type=_at_least(0), help="of the search (0)")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text}")
        return int(text)

    return number
