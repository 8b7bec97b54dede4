"""Intervals and tests of scores: against closed forms, by counting, and by how often they are wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lit_lora.evaluation.answer_metrics import perplexity, share
from lit_lora.evaluation.significance import interval, p_value, said, sign_test


def right(flags: list[int]) -> np.ndarray:
    return np.stack([np.array(flags, float), np.ones(len(flags))], axis=1)


def test_the_sign_test_is_that_of_a_fair_coin():
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert sign_test(3, 3) == 1
    assert sign_test(0, 0) == 1
    assert sign_test(5000, 4000) < 1e-20


def test_exact_match_is_tested_by_the_answers_that_only_one_model_has_right():
    before, after = right([0] * 6 + [1] * 50), right([1] * 6 + [1] * 50)
    assert p_value(before, after, share) == pytest.approx(2 / 64)
    assert p_value(after, before, share) == p_value(before, after, share)
    assert p_value(before, before, share) == 1


@pytest.mark.parametrize(
    ("num_right", "count", "low", "high"),
    [(0, 20, 0.0, 16.1), (20, 20, 83.9, 100.0), (67, 100, 57.3, 75.4)],  # Wilson (1927), as statsmodels has them
)
def test_the_interval_of_a_share_of_right_answers_is_wilsons(num_right, count, low, high):
    found = interval(right([1] * num_right + [0] * (count - num_right)), share)
    assert found == pytest.approx((low, high), abs=0.06)


def test_a_few_examples_are_tested_by_all_swaps_there_are():
    generator = np.random.default_rng(1)
    before, after = (np.stack([generator.random(6), np.ones(6)], axis=1) for _ in range(2))
    found = abs(share(after.sum(0)) - share(before.sum(0)))
    as_large = 0
    for flips in itertools.product((False, True), repeat=6):
        swap = np.array(flips)[:, None]
        one, other = np.where(swap, after, before), np.where(swap, before, after)
        as_large += abs(share(other.sum(0)) - share(one.sum(0))) >= found - 1e-9
    assert p_value(before, after, share) == pytest.approx(as_large / 64)


def test_one_example_proves_nothing():
    assert p_value(np.array([[9.0, 1]]), np.array([[0.1, 1]]), perplexity) == 1
    assert p_value(right([0]), right([1]), share) == 1


@pytest.mark.parametrize("num_examples", [20, 200])
def test_equal_models_are_called_different_about_one_time_in_twenty(num_examples):
    generator, called = np.random.default_rng(0), 0
    for _ in range(100):
        level = generator.random(num_examples)
        two = [
            np.stack([np.clip(level + generator.normal(0, 0.2, num_examples), 0, 1), np.ones(num_examples)], axis=1)
            for _ in range(2)
        ]
        called += p_value(*two, share) < 0.05
    assert called <= 12


def test_a_real_difference_is_found_and_an_interval_holds_the_truth():
    generator = np.random.default_rng(0)
    level = generator.random(200)
    before = np.stack([level, np.ones(200)], axis=1)
    after = np.stack([np.clip(level + generator.normal(0.1, 0.2, 200), 0, 1), np.ones(200)], axis=1)
    assert p_value(before, after, share) < 0.001
    low, high = interval(before, share)
    assert low < 50 < high
    assert 5 < high - low < 12  # 2 x 1.96 x 28.9 / sqrt(200) is 8


def test_the_finding_is_a_sentence():
    assert said(0.0001, is_better=True, than="the base") == "better than the base, p < 0.001"
    assert said(0.012, is_better=False, than="a") == "worse than a, p = 0.012"
    assert said(0.3, is_better=True, than="the base") == "cannot be told apart from the base, p = 0.3"
