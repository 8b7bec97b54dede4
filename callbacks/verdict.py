"""What a check of a run found, and the callback that finds it: the one form that reports, tests and others read."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import lightning.pytorch as pl

from lit_lora.callbacks._support.trainer import why_past_its_end


class NotProvedError(RuntimeError):
    """A check of the run failed. The command line exits with a code of its own for it."""


class Verdict(NamedTuple):
    """The outcome of one check of a run."""

    name: str
    """What was checked."""
    passed: bool | None
    """None where the run gave no answer: too short, interrupted, nothing to check."""
    detail: str
    """The numbers behind the outcome, and on failure what to change."""
    asked: bool = True
    """Whether an answer was asked for. A report without a bound to judge by keeps no run from being proved."""


class Check(pl.Callback, ABC):
    """A callback that judges the whole run, those parts too that came before it was resumed.

    The verdict is there when training has ended. A resumed run that has no step left to take never starts to train:
    then it is given at the end of fit, by what the checkpoint brought. A run that is past the end that it is given is
    not judged at all.
    """

    name: ClassVar[str]
    """What is checked."""

    key: ClassVar[str] = ""
    """What its settings are called by on the command line; of a check that has none there, the name of its class."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Settings that change neither what is trained nor how it is judged."""

    verdict: Verdict | None = None
    """None until the run is judged."""

    def settings(self) -> dict[str, Any]:
        """What it was given of what has an effect, by name: of a resumed run, the difference is named."""
        names = inspect.signature(type(self).__init__).parameters.keys() - {"self", *self.without_effect}
        key = self.key or type(self).__name__
        return {f"{key}.{name}": getattr(self, name) for name in sorted(names) if hasattr(self, name)}

    @abstractmethod
    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Verdict:
        """The verdict on the run as it stands; every rank must call it."""

    def raise_failure(self) -> None:
        """Raise what a failed verdict is to end with, if anything; called once every callback has saved what it has.

        Raises:
            NotProvedError: where that was asked for.
        """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the verdict of an earlier fit."""
        self.verdict = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the run."""
        self.verdict = self.judge(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge a run that had no step left, and raise what a failure is to end with."""
        if self.verdict is None:
            past = why_past_its_end(trainer)
            self.verdict = Verdict(self.name, None, past) if past else self.judge(trainer, pl_module)
        self.raise_failure()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """A run that ended early is not judged, unless a check ended it."""
        if self.verdict is None:
            self.verdict = self.judge_early(trainer, exception)

    @abstractmethod
    def judge_early(self, trainer: pl.Trainer, exception: BaseException) -> Verdict:
        """The verdict on a run that an exception ended; no collective, since it may be of one rank alone."""
