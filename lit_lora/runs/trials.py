"""Which values to try next, by what the runs so far have come to: a search over ranges and lists, by Optuna.

The study is made anew for each trial, from the values and losses so far, and seeded by the number of the trial: what
comes next follows from what was, so a search that was stopped goes on as if it had not been. Nothing of Optuna's is
kept on disk, and its storages, which would have to be locked and cleared up after a kill, are left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

DIGITS = 4
"""Of a number that is tried: as many as one would write."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_WHOLE = re.compile(r"[-+]?\d+")


class Range(NamedTuple):
    """Numbers from one to another, both among them; whole ones if both are."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"

    @property
    def is_log(self) -> bool:
        """Whether a decade or more lies in between: then each of its decades is tried as often."""
        return self.low > 0 and self.high / self.low >= 10


class Trial(NamedTuple):
    """What has been tried."""

    values: Mapping[str, Any]
    loss: float
    """NaN if it failed."""


def read_range(text: str) -> Range | None:
    """The range that is written as ``1e-5..1e-3``; None for any other text.

    Raises:
        ValueError: if it ends before it begins.
    """
    if (found := _RANGE.fullmatch(text)) is None:
        return None
    low, high = (int(end) if all(map(_WHOLE.fullmatch, found.groups())) else float(end) for end in found.groups())
    if not low < high < math.inf:
        raise ValueError(f"{text}: expected the lower end of a range first, as in 1e-5..1e-3")
    return Range(low, high)


def check_installed() -> None:
    """Raise an ``ImportError`` that says what to install, if Optuna is not there."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError("--trials needs the package optuna: pip install 'lit-lora[sweep]'") from error


def next_values(space: Mapping[str, Range | Sequence[Any]], so_far: Sequence[Trial], *, seed: int) -> dict[str, Any]:
    """What Optuna's TPE sampler would try next: at random in the first ten trials, then near the better ones.

    Args:
        space: what each setting can be.
        so_far: all trials, in their order.
        seed: of the search.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(values) for key, values in space.items()}
    of_this_trial = int(np.random.SeedSequence([seed, len(so_far)]).generate_state(1)[0])
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=of_this_trial))
    for trial in so_far:
        params = {key: value if isinstance(space[key], Range) else json.dumps(value)
                  for key, value in trial.values.items()}  # fmt: skip
        failed = math.isnan(trial.loss)
        state = optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                state=state, value=None if failed else trial.loss, params=params, distributions=distributions
            )
        )
    suggested = study.ask(distributions).params
    return {key: _rounded(suggested[key], values) if isinstance(values, Range) else json.loads(suggested[key])
            for key, values in space.items()}  # fmt: skip


def _distribution(values: Range | Sequence[Any]) -> Any:
    from optuna import distributions

    if not isinstance(values, Range):  # Optuna's categories are plain values: a list is one as text
        return distributions.CategoricalDistribution([json.dumps(value) for value in values])
    if isinstance(values.low, int):
        return distributions.IntDistribution(values.low, int(values.high), log=values.is_log)
    return distributions.FloatDistribution(values.low, values.high, log=values.is_log)


def _rounded(number: float, values: Range) -> float:
    if isinstance(number, int):
        return number
    return min(max(float(f"{number:.{DIGITS}g}"), values.low), values.high)
