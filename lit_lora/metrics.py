"""What a training step and a whole run measured, and the assertion that a run converged.

Plain Python numbers only, one JSON object a line, so that a file of them can grow with the run. Nothing here imports
torch: other projects and quick command-line verbs read a run with this file alone, a run that is still going on too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lit_lora.files.atomic import atomic_text

FILE_NAME = "metrics.jsonl"
"""Of the record, in the folder of a run."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step."""

    step: int
    """Optimizer steps taken, this one included."""
    loss: float
    """Mean negative log-likelihood per supervised token, in nats, over the whole optimizer step; NaN (null in JSON) for
    a step without one."""
    loss_scale: float
    """Factor on the loss before the backward pass under fp16 mixed precision; 1.0 otherwise."""
    grad_norm: float
    """L2 norm of the gradient of all trainable parameters, before clipping."""
    param_norm: float
    """L2 norm of all trainable parameters, before the update."""
    learning_rate: float
    """Learning rate of the first parameter group."""
    step_time_s: float
    """Wall-clock seconds since the step before ended."""
    num_tokens: int
    """Real (unpadded) tokens over all micro-batches and ranks."""
    num_target_tokens: int
    """Supervised tokens over all micro-batches and ranks."""


@dataclass
class TrainingMetrics:
    """The record of a run: one :class:`StepMetrics` a step, and the validations."""

    steps: list[StepMetrics] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    """One entry a validation run: ``step`` and what was logged (``val_loss``, ``val_perplexity``, ...)."""

    @property
    def losses(self) -> list[float]:
        """Loss per step, in nats per supervised token, of the steps that had one to learn from."""
        return [step.loss for step in self.steps if step.num_target_tokens]

    @property
    def validation_losses(self) -> dict[str, list[float]]:
        """The first and the last loss on validation data, or the only one: under "" over all of it, then by source."""
        ends = [*self.validation[:1], *self.validation[1:][-1:]]
        names = [name for name in (ends[-1] if ends else {}) if name == "val_loss" or name.startswith("val_loss/")]
        return {name.partition("/")[2]: [end[name] for end in ends if name in end] for name in sorted(names)}

    @property
    def num_tokens(self) -> int:
        """Real tokens trained on."""
        return sum(step.num_tokens for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second; the first step, which pays for warm-up, is left out where there are more."""
        timed = self.steps[1:] or self.steps
        seconds = sum(step.step_time_s for step in timed)
        return sum(step.num_tokens for step in timed) / seconds if seconds > 0 else 0.0

    def to_jsonl(self, *, after_steps: int = 0, after_validations: int = 0) -> str:
        """One JSON object a line, in the order in which they were measured.

        Args:
            after_steps: leave out so many of the first steps.
            after_validations: leave out so many of the first validations.
        """
        entries = [asdict(step) for step in self.steps[after_steps:]]
        for entry in entries:
            entry["loss"] = None if math.isnan(entry["loss"]) and not entry["num_target_tokens"] else entry["loss"]
        entries = sorted([*entries, *self.validation[after_validations:]], key=lambda entry: entry["step"])
        return "".join(json.dumps(entry) + "\n" for entry in entries)

    @classmethod
    def from_jsonl(cls, text: str) -> TrainingMetrics:
        """The inverse of :meth:`to_jsonl`. A last line without an end was being written, and does not count.

        Raises:
            ValueError: naming fields that are missing or unknown, as those of another version may be, or no numbers.
        """
        metrics = cls()
        for number, line in enumerate(text.split("\n")[:-1], start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of the metrics is no JSON object: {line!r:.80}") from error
            if isinstance(entry, dict) and "val_loss" in entry:
                _check_numbers("a validation's metrics", entry)
                if "step" not in entry:
                    raise ValueError("a validation's metrics lack step")
                metrics.validation.append(entry)
                continue
            _check_fields("a step's metrics", entry)
            without_loss = entry["loss"] is None and entry["num_target_tokens"] == 0
            entry["loss"] = math.nan if without_loss else entry["loss"]
            _check_numbers("a step's metrics", entry)
            metrics.steps.append(StepMetrics(**entry))
        return metrics

    def save(self, path: str | Path) -> None:
        """Write all as JSON lines; the file is replaced whole."""
        atomic_text(path, self.to_jsonl())

    @classmethod
    def load(cls, path: str | Path) -> TrainingMetrics:
        """Read the ``metrics.jsonl`` of a run, or what :meth:`save` wrote."""
        return cls.from_jsonl(Path(path).read_text(encoding="utf-8"))


def window_means(losses: Sequence[float], window: int) -> tuple[float, float]:
    """Mean of the first and of the last ``window`` losses, of half of all each where there are fewer than two windows.

    Raises:
        ValueError: for fewer than two losses, a window below 1, or a loss that is not finite.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 step, got {window}")
    if len(losses) < 2:
        raise ValueError(f"convergence needs at least 2 losses, got {len(losses)}")
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise ValueError(f"loss {loss} of entry {step} is not finite")
    window = min(window, len(losses) // 2)
    return _mean(losses[:window]), _mean(losses[-window:])


def assert_loss_convergence(losses: Sequence[float], min_decrease: float = 0.3, window: int = 25) -> float:
    """Assert that the mean loss of the last ``window`` steps lies ``min_decrease`` below that of the first.

    Args:
        losses: loss per step, in order.
        min_decrease: smallest relative decrease that passes; 0.3 is 30%.
        window: steps averaged at each end.

    Returns:
        The relative decrease.

    Raises:
        AssertionError: with both means, if the decrease is smaller.
        ValueError: see :func:`window_means`.
    """
    first, last = window_means(losses, window)
    decrease = (first - last) / first
    if decrease < min_decrease:
        raise AssertionError(
            f"loss fell by {decrease:.1%} (mean of the first {window} steps {first:.4f}, of the last {last:.4f}), "
            f"expected at least {min_decrease:.1%} over {len(losses)} steps"
        )
    return decrease


def _check_fields(what: str, content: Any) -> None:
    known = {field.name for field in fields(StepMetrics)}
    given = set(content) if isinstance(content, Mapping) else set()
    problems = [f"missing {', '.join(sorted(known - given))}"] if known - given else []
    problems += [f"unknown {', '.join(sorted(map(str, given - known)))}"] if given - known else []
    if problems:
        raise ValueError(f"{what} are not those of this version of lit_lora: {'; '.join(problems)}")


def _check_numbers(what: str, content: Mapping[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{what} hold {value!r:.80} for {name}, expected a number")


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
