"""How good a model is on held-out examples, without its adapter and with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lit_lora.adapters.merge import disable_lora
from lit_lora.data.chats.tokenize import format_prompt
from lit_lora.data.chats.turn_end import turn_end
from lit_lora.evaluation.answer_metrics import ANSWER_METRICS, Scored, check_metrics, default_metrics
from lit_lora.evaluation.held_out import HeldOut, read_held_out, with_calls
from lit_lora.evaluation.likelihood import mean_loss, token_metrics, token_sums
from lit_lora.evaluation.load import Loaded
from lit_lora.evaluation.significance import Interval, interval, p_value, said
from lit_lora.language_model.generation import PROMPTS_AT_A_TIME, Completion, complete
from lit_lora.wording import setting

BASE = "the base"
_MOST_SHOWN = 20
"""Scores in a table: answers may have any number of fields."""


@dataclass(frozen=True)
class Answers:
    """What was written to the prompts."""

    texts: list[str]
    """Without white space around them."""
    exact_match: float
    """Percent that are the expected answer."""
    num_cut: int
    """Of them, still going on at ``max_new_tokens``."""


@dataclass(frozen=True)
class Measured:
    """What one model came to."""

    loss: float
    """Mean over target tokens, those of all assistant turns, in nats; as validation measures it."""
    answers: Answers | None
    """None of plain text, which asks for none, and where no metric looks at them."""
    scored: dict[str, Scored]
    """Scores by name, example by example."""


@dataclass(frozen=True)
class Comparison:
    """One score of two models on the same examples."""

    before: float
    before_interval: Interval
    after: float
    after_interval: Interval
    p: float
    """How likely so large a difference is if both are equally good: see ``significance.py``."""
    is_better: bool
    """Whether the second one is ahead, however little."""
    unit: str

    def said(self, than: str = BASE) -> str:
        """The finding in a sentence."""
        return said(self.p, is_better=self.is_better, than=than)

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it."""
        sides = {"before": (self.before, self.before_interval), "after": (self.after, self.after_interval)}
        values = {name: {"value": value, "low": ci.low, "high": ci.high} for name, (value, ci) in sides.items()}
        return {**values, "p": self.p, "finding": self.said()}


@dataclass(frozen=True)
class Scores:
    """Before fine-tuning (the adapter switched off) and after."""

    num_examples: int
    base: Measured
    adapted: Measured
    expected: list[str]
    """Answers that were to be given."""
    max_new_tokens: int

    @property
    def before(self) -> Answers | None:
        """Of the base."""
        return self.base.answers

    @property
    def after(self) -> Answers | None:
        """With the adapter."""
        return self.adapted.answers

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Each score by name."""
        return compared(self.base.scored, self.adapted.scored)

    def to_dict(self) -> dict[str, Any]:
        """As a file holds it: plain types."""
        found: dict[str, Any] = {"mean_loss": {"before": self.base.loss, "after": self.adapted.loss}}
        found["scores"] = {name: comparison.to_dict() for name, comparison in self.comparisons.items()}
        if self.before is None or self.after is None:
            return found
        return {
            "exact_match": {"before": self.before.exact_match, "after": self.after.exact_match},
            "cut": {"before": self.before.num_cut, "after": self.after.num_cut},
            "expected": self.expected,
            "before": self.before.texts,
            "after": self.after.texts,
            **found,
        }

    def __str__(self) -> str:
        lines = [*table({"before": self.base, "after": self.adapted}, self.comparisons), ""]
        if self.before is not None and self.after is not None:
            lines.append(
                f"exact match on {self.num_examples} held-out examples: {self.before.exact_match:.1f} % before, "
                f"{self.after.exact_match:.1f} % after"
            )
            if self.before.num_cut or self.after.num_cut:
                lines.append(
                    f"{self.before.num_cut} before and {self.after.num_cut} after of {self.num_examples} answers were "
                    f"cut at max_new_tokens={self.max_new_tokens}: a cut answer counts as wrong unless it is right "
                    "as it is"
                )
        lines.append(f"mean loss per target token: {self.base.loss:.3f} before, {self.adapted.loss:.3f} after")
        return "\n".join(lines)


def compared(before: Mapping[str, Scored], after: Mapping[str, Scored]) -> dict[str, Comparison]:
    """Each score of two models that were asked the same, by name."""
    found = {}
    for name, one in before.items():
        other = after[name]
        values = [float(side.value(side.sums.sum(axis=0))) for side in (one, other)]
        intervals = [interval(side.sums, side.value) for side in (one, other)]
        p = p_value(one.sums, other.sums, one.value)
        is_better = values[1] > values[0] if one.higher_is_better else values[1] < values[0]
        found[name] = Comparison(values[0], intervals[0], values[1], intervals[1], p, is_better, one.unit)
    return found


def score(
    loaded: Loaded,
    data: str | HeldOut,
    *,
    metrics: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    base: Measured | None = None,
    name: str = "the adapter",
) -> Scores:
    """Measure a model without and with its adapter.

    Args:
        loaded: from :func:`lit_lora.load`, with an adapter.
        data: file of examples, or what :func:`read_held_out` made of one.
        metrics: of ``exact_match``, ``token_accuracy``, ``perplexity``, ``rouge``, ``bleu`` and ``json``; None for
            the first three, and json where every expected answer is a JSON object.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts at a time; by default 25, for answers on a CPU what 16,384 tokens hold.
        progress: called with what is answered ("without the adapter", ...), how many are, and of how many.
        base: what the base came to with the same data, if that is known.
        name: of the adapter, for ``progress``.

    Raises:
        ValueError: if the loss is no number, the model does not know a token, or a metric has nothing to measure.
    """
    held_out = read_held_out(data, loaded.trained_on) if isinstance(data, str) else data
    held_out = with_calls(loaded.tokenizer, held_out)
    names = default_metrics(held_out.expected) if metrics is None else list(dict.fromkeys(metrics))
    check_metrics(names, has_answers=bool(held_out.prompts))
    for metric in names:  # what an expected answer cannot be measured by is known before any is given
        if metric in ANSWER_METRICS:
            ANSWER_METRICS[metric](held_out.expected, held_out.expected)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "progress": progress}
    at_a_time = PROMPTS_AT_A_TIME if batch_size is None else batch_size
    asks = any(metric in ANSWER_METRICS for metric in names)

    def sums() -> Any:
        return token_sums(loaded.model, loaded.tokenizer, held_out, batch_size=at_a_time)

    after = sums()  # first: a loss that is no number needs no answers
    if base is None:
        with disable_lora(loaded.model):
            before = sums()
            answers = _answers(loaded, held_out, f"without {name}", **options) if asks else None
        base = _measured(before, answers, held_out.expected, names)
    answers = _answers(loaded, held_out, f"with {name}", **options) if asks else None
    adapted = _measured(after, answers, held_out.expected, names)
    return Scores(len(held_out.examples.items), base, adapted, held_out.expected, max_new_tokens)


def table(models: Mapping[str, Measured], *comparisons: Mapping[str, Comparison]) -> list[str]:
    """Lines on every score of every model, with its interval, and what is found of it.

    Args:
        models: by name; the first is what the others are compared with.
        comparisons: of each of the others with it, in that order.
    """
    width = max(len(name) for name in comparisons[0]) + 2
    second = max(len(name) for name in models) + 2
    lines = ["95 % confidence intervals in brackets; p by sign test or random swaps of the same prompts"]
    for score_name, first in list(comparisons[0].items())[:_MOST_SHOWN]:
        cells = [(first.before, first.before_interval, "")]
        cells += [(c[score_name].after, c[score_name].after_interval, c[score_name].said()) for c in comparisons]
        for number, (model, (value, ci, finding)) in enumerate(zip(models, cells, strict=True)):
            digits = 1 if first.unit else 2
            shown = f"{value:.{digits}f}{first.unit} [{ci.low:.{digits}f}, {ci.high:.{digits}f}]"
            lines.append(f"{'' if number else score_name:<{width}}{model:<{second}}{shown:<28}{finding}".rstrip())
    more = len(comparisons[0]) - _MOST_SHOWN
    return [*lines, f"and {more} more scores, which {setting('output')} keeps"] if more > 0 else lines


def _measured(sums: Any, answers: Answers | None, expected: Sequence[str], names: Sequence[str]) -> Measured:
    scored: dict[str, Scored] = {}
    of_tokens = token_metrics(sums)
    for name in names:
        if name in of_tokens:
            scored[name.replace("_", " ")] = of_tokens[name]
        elif answers is not None:
            scored |= ANSWER_METRICS[name](_without_reasoning(answers.texts), expected)
    return Measured(mean_loss(sums), answers, scored)


def _without_reasoning(texts: Sequence[str]) -> list[str]:
    """Reasoning is nobody's to match: the answer comes after it."""
    return [text.rpartition("</think>")[2].strip() for text in texts]


def _answers(
    loaded: Loaded,
    held_out: HeldOut,
    name: str,
    *,
    max_new_tokens: int,
    batch_size: int | None,
    progress: Callable[[str, int, int], None] | None,
) -> Answers:
    model, tokenizer, _ = loaded
    pairs = list(zip(held_out.prompts, held_out.examples.items, strict=True))
    ids = [format_prompt(tokenizer, m, e.tools, e.options, reasoning=held_out.reasoning) for m, e in pairs]
    written: Sequence[Completion] = complete(
        model,
        tokenizer,
        ids,
        end=turn_end(tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=None if progress is None else lambda done: progress(name, done, len(ids)),
    )
    texts = [answer.text.strip() for answer in written]
    right = sum(got == want for got, want in zip(_without_reasoning(texts), held_out.expected, strict=True))
    return Answers(texts, 100 * right / len(texts), sum(answer.cut for answer in written))
