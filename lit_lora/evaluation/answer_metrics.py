"""What an answer is worth beside the one that was expected: the metrics of ``evaluate``, as a table of functions.

Each gives one or several scores, as sums example by example (``significance.py``), so that intervals and tests are
possible. ROUGE and BLEU count with torchmetrics. Its ROUGE knows ASCII letters only and gives any other writing 0, so
words are found here; rougeLsum, which needs nltk, is left out.

Shapes: N examples, K sums.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_lora.evaluation.significance import Sums, Value

_CHINESE = "\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CHINESE}]|[^\W_{_CHINESE}]+")
"""A run of letters and digits; of writing without spaces, a character."""
_WRAPPED = re.compile(r"```\w*\s+(?P<fenced>.*?)\s*```|<(?P<tag>\w+)>\s*(?P<tagged>.*?)\s*</(?P=tag)>", re.DOTALL)
_NUM_GRAMS = 4
_MISSING = object()


class Scored(NamedTuple):
    """One score, example by example."""

    sums: Sums
    """``(N, K)``."""
    value: Value
    """What the score is, from the sums of any examples."""
    higher_is_better: bool = True
    unit: str = " %"
    """Behind its number."""


def share(sums: Sums) -> NDArray[np.float64]:
    """Percent: of two sums, the first by the second; not a number without any."""
    return 100 * _ratio(sums)


def perplexity(sums: Sums) -> NDArray[np.float64]:
    """Of summed negative log-likelihoods and the weight of their tokens."""
    return np.exp(_ratio(sums))


def bleu_of(sums: Sums) -> NDArray[np.float64]:
    """Corpus BLEU in percent: of lengths written and expected, n-grams found and n-grams written (Papineni et al. 2002,
    without smoothing)."""
    written, expected, found, there = sums[..., 0], sums[..., 1], sums[..., 2 : 2 + _NUM_GRAMS], sums[..., -_NUM_GRAMS:]
    precision = np.divide(found, there, out=np.zeros_like(found), where=there > 0)
    with np.errstate(divide="ignore"):  # a precision of zero makes it zero
        mean = np.exp(np.log(precision).mean(axis=-1))
    brevity = np.exp(np.minimum(0.0, 1 - expected / np.maximum(written, 1e-9)))
    return 100 * brevity * mean


def exact_match(texts: Sequence[str], expected: Sequence[str]) -> dict[str, Scored]:
    """The very answer that was expected."""
    return {"exact match": _right([got == want for got, want in zip(texts, expected, strict=True)])}


def rouge(texts: Sequence[str], expected: Sequence[str]) -> dict[str, Scored]:
    """ROUGE-1, -2 and -L: words, pairs of them and the longest common subsequence; mean F1 of the examples."""
    from torchmetrics.functional.text import rouge_score

    kinds, keys = ("rouge1", "rouge2", "rougeL"), ("rouge1_fmeasure", "rouge2_fmeasure", "rougeL_fmeasure")
    rows = [
        rouge_score([got], [want], rouge_keys=kinds, normalizer=str.lower, tokenizer=_WORD.findall)
        for got, want in zip(texts, expected, strict=True)
    ]
    ones = np.ones(len(rows))
    return {
        name: Scored(np.stack([[float(row[key]) for row in rows], ones], axis=1), share)
        for name, key in zip(("ROUGE-1", "ROUGE-2", "ROUGE-L"), keys, strict=True)
    }


def bleu(texts: Sequence[str], expected: Sequence[str]) -> dict[str, Scored]:
    """BLEU of all answers together, as sacrebleu counts words (``13a``; ``zh`` where Chinese or Japanese is expected).

    Raises:
        ValueError: if no expected answer has as many words as BLEU counts together.
    """
    from torchmetrics.text import SacreBLEUScore

    metric = SacreBLEUScore(_NUM_GRAMS, tokenize="zh" if re.search(f"[{_CHINESE}]", "".join(expected)) else "13a")
    rows = []
    for got, want in zip(texts, expected, strict=True):
        metric.reset()
        metric.update([got], [[want]])
        rows.append([metric.preds_len, metric.target_len, *metric.numerator, *metric.denominator])
    sums = np.array(rows, dtype=np.float64)
    if not (sums[:, 1] >= _NUM_GRAMS).any():
        raise ValueError(
            f"bleu compares runs of {_NUM_GRAMS} words, and no expected answer has so many: leave it out (rouge and "
            "exact_match take short answers)"
        )
    return {"BLEU": Scored(sums, bleu_of, unit="")}


def json_match(texts: Sequence[str], expected: Sequence[str]) -> dict[str, Scored]:
    """Answers that are JSON objects: the whole of them, all fields, and each field by its path (``item.price``).

    Numbers are compared by value, objects field by field, lists as a whole. An answer in a code fence or a pair of tags
    is what stands within.

    Raises:
        ValueError: if an expected answer is no JSON object.
    """
    wanted = [read_object(text) for text in expected]
    if None in wanted:
        raise ValueError(
            f"json compares JSON objects, and answer {wanted.index(None) + 1} of those expected is none: "
            f"{expected[wanted.index(None)]!r:.80}; leave it out"
        )
    fields = [_fields(found) for found in wanted if found is not None]
    got = [None if (found := read_object(text)) is None else _fields(found) for text in texts]
    right = [
        {name: given is not None and _same(given.get(name, _MISSING), value) for name, value in want.items()}
        for want, given in zip(fields, got, strict=True)
    ]
    whole = [
        given is not None and all(r.values()) and given.keys() == r.keys() for given, r in zip(got, right, strict=True)
    ]
    names = [name for name, _ in Counter(name for row in right for name in row).most_common()]
    found = {"JSON": _right(whole)}
    found["JSON fields"] = Scored(np.array([[sum(row.values()), len(row)] for row in right], np.float64), share)
    for name in names:
        found[f"JSON {name}"] = Scored(
            np.array([[row.get(name, False), name in row] for row in right], np.float64), share
        )
    return found


ANSWER_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], dict[str, Scored]]] = {
    "exact_match": exact_match,
    "rouge": rouge,
    "bleu": bleu,
    "json": json_match,
}
"""Name -> function of the answers given and expected; each gives scores by the names that are shown."""

TOKEN_METRICS = ("token_accuracy", "perplexity")
"""Told from the expected answers alone: how likely the model finds them."""


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None if it is none."""
    if wrapped := _WRAPPED.fullmatch(text.strip()):
        text = wrapped["fenced"] if wrapped["fenced"] is not None else wrapped["tagged"]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def check_metrics(names: Sequence[str], *, has_answers: bool) -> None:
    """Check that these metrics exist, and that there is something to measure.

    Raises:
        ValueError: naming the first that cannot be.
    """
    known = (*ANSWER_METRICS, *TOKEN_METRICS)
    for name in names:
        if name not in known:
            raise ValueError(f"no metric {name!r}: known are {', '.join(known)}")
        if name in ANSWER_METRICS and not has_answers:
            raise ValueError(
                f"{name} compares answers, and plain text asks for no answers: take {' or '.join(TOKEN_METRICS)}"
            )
    if not names:
        raise ValueError(f"no metric is named: known are {', '.join(known)}")


def default_metrics(expected: Sequence[str]) -> list[str]:
    """Metrics that say something of any answers, and of JSON objects where all are such; without answers, of tokens."""
    structured = bool(expected) and all(read_object(text) is not None for text in expected)
    return [*(["exact_match"] if expected else []), *(["json"] if structured else []), *TOKEN_METRICS]


def _ratio(sums: Sums) -> NDArray[np.float64]:
    count = sums[..., 1]
    return np.divide(sums[..., 0], count, out=np.full(count.shape, np.nan), where=count > 0)


def _right(flags: Sequence[bool]) -> Scored:
    return Scored(np.stack([np.array(flags, np.float64), np.ones(len(flags))], axis=1), share)


def _fields(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by path; an object without fields is a value."""
    found: dict[str, Any] = {}
    for name, value in content.items():
        path = f"{prefix}{name}"
        found |= _fields(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two values of JSON are equal, where Python's ``True == 1`` is no equality."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[name]) for name, value in one.items())
    return bool(one == other)
