"""Metrics of answers: as torchmetrics counts whole corpora, in any writing, and JSON field by field."""

from __future__ import annotations

import pytest
from torchmetrics.functional.text import rouge_score, sacre_bleu_score

from lit_lora.evaluation.answer_metrics import (
    ANSWER_METRICS,
    Scored,
    bleu,
    check_metrics,
    default_metrics,
    exact_match,
    json_match,
    read_object,
    rouge,
)

WANTED = [
    "The cat sat on the mat, as it does every day.",
    "Two ships & a boat left at 3:30 pm today.",
    "Nobody knows what it is.",
]
WRITTEN = ["The cat sat on a mat, as it did every day!", "Two boats left at 3:30 pm.", "Nobody knows what it is."]


def value(scored: Scored) -> float:
    return float(scored.value(scored.sums.sum(axis=0)))


def test_bleu_is_that_of_the_whole_corpus():
    expected = 100 * float(sacre_bleu_score(WRITTEN, [[want] for want in WANTED], tokenize="13a"))
    assert 20 < expected < 90
    assert value(bleu(WRITTEN, WANTED)["BLEU"]) == pytest.approx(expected, rel=1e-5)
    assert value(bleu(["entirely other words here now"], WANTED[:1])["BLEU"]) == 0
    assert value(bleu(WANTED, WANTED)["BLEU"]) == pytest.approx(100)


def test_rouge_of_plain_english_is_that_of_torchmetrics():
    expected = rouge_score(WRITTEN, WANTED, rouge_keys=("rouge1", "rouge2", "rougeL"))
    found = rouge(WRITTEN, WANTED)
    for name, key in {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}.items():
        assert value(found[name]) == pytest.approx(100 * float(expected[f"{key}_fmeasure"]), rel=1e-5)


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("東京は大きい都市です", "東京は大きい町です"),
        ("кошка сидит на ковре", "кошка лежит на ковре"),
        ("Größe zählt nicht sehr", "Größe zählt hier sehr"),
    ],
)
def test_words_of_any_writing_count(written, wanted):
    for name in ("ROUGE-1", "ROUGE-L"):
        assert 50 < value(rouge([written], [wanted])[name]) < 100
    assert value(bleu([wanted], [wanted])["BLEU"]) == pytest.approx(100)


def test_bleu_of_answers_that_are_too_short_for_it_is_refused():
    with pytest.raises(ValueError, match="no expected answer has so many: leave it out"):
        bleu(["yes"], ["no"])


SAME = '{"a": 1, "b": {"c": [1, 2], "d": null}}'
ANSWERS: dict[str, tuple[str, dict[str, float]]] = {
    "the same in another order": ('{"b": {"d": null, "c": [1, 2]}, "a": 1.0}', {"JSON": 100, "JSON fields": 100}),
    "in a code fence": (f"```json\n{SAME}\n```", {"JSON": 100, "JSON fields": 100}),
    "in tags": (f"<tool_call>\n{SAME}\n</tool_call>", {"JSON": 100}),
    "one field wrong": (SAME.replace("null", '""'), {"JSON": 0, "JSON fields": 200 / 3, "JSON b.d": 0, "JSON a": 100}),
    "true is not one": (SAME.replace('"a": 1', '"a": true'), {"JSON": 0, "JSON a": 0, "JSON b.c": 100}),
    "a field too many": (SAME.replace('"a": 1', '"a": 1, "z": 1'), {"JSON": 0, "JSON fields": 100}),
    "a list in another order": (SAME.replace("[1, 2]", "[2, 1]"), {"JSON b.c": 0, "JSON a": 100}),
    "no JSON": ("a is 1", {"JSON": 0, "JSON fields": 0, "JSON a": 0}),
    "talk around it": (f"Here you are: {SAME}", {"JSON": 0, "JSON fields": 0}),
    "no object": ("[1]", {"JSON": 0, "JSON fields": 0}),
    "deep": ("[" * 100_000, {"JSON": 0}),
}


@pytest.mark.parametrize(("written", "expected"), ANSWERS.values(), ids=ANSWERS)
def test_json_is_compared_field_by_field(written, expected):
    found = json_match([written], [SAME])
    assert {name: value(found[name]) for name in expected} == pytest.approx(expected)
    assert set(found) == {"JSON", "JSON fields", "JSON a", "JSON b.c", "JSON b.d"}


def test_a_field_is_measured_where_it_is_expected():
    found = json_match(['{"a": 1}', '{"b": 2}'], ['{"a": 1}', '{"b": 3}'])
    assert value(found["JSON a"]) == 100
    assert value(found["JSON b"]) == 0
    assert value(found["JSON fields"]) == 50


def test_an_expected_answer_that_is_no_json_is_named():
    with pytest.raises(ValueError, match=r"answer 2 of those expected is none: 'Paris'; leave it out"):
        json_match([SAME, SAME], [SAME, "Paris"])


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (["yes", SAME], ["exact_match", "token_accuracy", "perplexity"]),
        ([SAME, "{}"], ["exact_match", "json", "token_accuracy", "perplexity"]),
        ([], ["token_accuracy", "perplexity"]),
    ],
)
def test_what_is_measured_by_default_follows_from_the_answers(expected, names):
    assert default_metrics(expected) == names
    check_metrics(names, has_answers=bool(expected))


@pytest.mark.parametrize(
    ("names", "has_answers", "message"),
    [
        (["rogue"], True, "no metric 'rogue': known are exact_match, rouge, bleu, json, token_accuracy, perplexity"),
        (["perplexity", "bleu"], False, "bleu compares answers, and plain text asks for no answers"),
        ([], True, "no metric is named"),
    ],
)
def test_metrics_that_cannot_be_are_refused(names, has_answers, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(names, has_answers=has_answers)


@pytest.mark.parametrize("name", ANSWER_METRICS)
def test_each_metric_has_a_row_for_each_example(name):
    texts = [SAME.replace("2", "2, 3, 4, 5, 6")] * 4
    for scored in ANSWER_METRICS[name](texts, texts).values():
        assert len(scored.sums) == 4
        assert value(scored) == pytest.approx(100)


def test_exact_match_and_objects_are_what_they_say():
    assert value(exact_match(["a", "b "], ["a", "b"])["exact match"]) == 50
    assert read_object(" {} ") == {}
    assert read_object('{"a": 1') is None
