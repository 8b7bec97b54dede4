"""What a search tries next: within its ranges, the same again after a stop, and better than chance."""

from __future__ import annotations

import math
import sys

import pytest

from lit_lora.runs.trials import Range, Trial, check_installed, next_values, read_range

SPACE = {"lr": Range(1e-5, 1e-1), "r": Range(1, 64), "dropout": Range(0.0, 0.2), "kind": ["a", ["b", "c"], True, 8]}


def loss(values) -> float:
    """Lowest at lr 1e-3 and r 8."""
    return abs(math.log10(values["lr"]) + 3) + abs(math.log2(values["r"]) - 3) + values["dropout"]


def search(num_trials: int, *, seed: int = 0, so_far: tuple[Trial, ...] = ()) -> list[Trial]:
    tried = list(so_far)
    while len(tried) < num_trials:
        values = next_values(SPACE, tried, seed=seed)
        tried.append(Trial(values, math.nan if len(tried) == 3 else loss(values)))  # one fails
    return tried


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5..1e-3", Range(1e-5, 1e-3)),
        ("4..64", Range(4, 64)),
        ("-1..1.5", Range(-1.0, 1.5)),
        (".1...5", Range(0.1, 0.5)),
        ("4,8,16", None),
        ("../a.jsonl", None),
        ("a..b", None),
        ("4", None),
    ],
)
def test_a_range_is_read(text, expected):
    found = read_range(text)
    assert found == expected
    if expected is not None:
        assert [type(end) for end in found] == [type(end) for end in expected]


@pytest.mark.parametrize("text", ["1e-3..1e-5", "4..4", "1..1e999"])
def test_a_range_that_is_none_is_named(text):
    with pytest.raises(ValueError, match="expected the lower end of a range first"):
        read_range(text)


@pytest.mark.parametrize(
    ("values", "is_log"),
    [(Range(1e-5, 1e-3), True), (Range(1, 10), True), (Range(2, 8), False), (Range(0.0, 0.5), False)],
)
def test_decades_are_tried_alike(values, is_log):
    assert values.is_log == is_log


def test_values_lie_in_the_space_and_are_of_its_types():
    tried = search(12)
    for values, _ in tried:
        assert list(values) == list(SPACE)
        assert 1e-5 <= values["lr"] <= 1e-1
        assert values["lr"] == float(f"{values['lr']:.4g}"), "as one would write it"
        assert isinstance(values["r"], int)
        assert 1 <= values["r"] <= 64
        assert 0 <= values["dropout"] <= 0.2
        assert values["kind"] in SPACE["kind"]
    assert len({values["lr"] for values, _ in tried}) == 12
    assert {type(values["kind"]) for values, _ in tried} == {str, list, bool, int}


def test_a_search_goes_on_after_any_trial_as_if_it_had_not_been_stopped():
    whole = [values for values, _ in search(16)]
    for stopped_after in (1, 3, 4, 10, 13):
        assert [values for values, _ in search(16, so_far=tuple(search(stopped_after)))] == whole
    assert [values for values, _ in search(3, seed=1)] != whole[:3]


def test_later_trials_are_better_than_the_first_ones():
    losses = [loss(values) for values, _ in search(40)]
    assert sum(losses[-20:]) / 20 < 0.6 * sum(losses[:10]) / 10


def test_without_optuna_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'lit-lora\[sweep\]'"):
        check_installed()
