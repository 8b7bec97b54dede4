"""Answers of an adapter on a base in half precision, by the command line: its factors are rounded once, for all tokens.

In whatever order prompts are asked, and asked again, each has its answer.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lit_lora.adapters import half_precision, layers
from tests.started_runs import ANSWERS, fit, lit_lora, make_base, questions, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]
LAYERS = 2 * 7


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    base = make_base(folder / "base")
    options = {"model__dtype": "bfloat16", "trainer__enable_model_summary": "false"}
    return fit(base, questions(folder / "train.jsonl"), folder / "run", max_steps=40, **options)


@pytest.fixture
def calls(monkeypatch):
    """How often factors were rounded for later, and how often at once."""
    found: Counter[str] = Counter()

    def counted(place, name):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given: found.update([name]) or original(*given))

    counted(half_precision.RoundedFactors, "of")
    counted(half_precision, "_in_half_precision")
    counted(layers, "rounded_linear")
    return found


def asked(adapter: Path, prompts: list[str]) -> dict[str, str]:
    data, output = adapter.parent / "prompts.jsonl", adapter.parent / "answers.jsonl"
    output.unlink(missing_ok=True)
    write_rows(data, [{"prompt": prompt} for prompt in prompts])
    lit_lora("generate", data, adapter=adapter, max_new_tokens=12, output=output)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return {row["prompt"]: row["completion"] for row in rows}


def test_generate_rounds_them_once_and_answers_each_prompt(trained, calls):
    assert asked(trained, [*ANSWERS]) == ANSWERS
    assert calls["of"] == LAYERS
    assert calls["_in_half_precision"] == 0
    assert calls["rounded_linear"] > 5 * LAYERS
    assert asked(trained, [*ANSWERS][::-1]) == ANSWERS
    assert asked(trained, ["say two"]) == {"say two": "no way"}
    assert calls["of"] == 3 * LAYERS


@pytest.mark.parametrize("options", [{}, {"temperature": "1", "seed": "3"}], ids=["greedy", "sampled"])
def test_so_does_one_prompt_however_it_is_answered(trained, calls, options):
    lit_lora("generate", "say one", adapter=trained, max_new_tokens=12, **options)
    assert (calls["of"], calls["_in_half_precision"]) == (LAYERS, 0)


def test_evaluate_rounds_them_once_for_its_answers(trained, calls, tmp_path):
    """What is rounded at once are those of its likelihoods, however long answers are."""
    data, found = questions(tmp_path / "test.jsonl"), []
    for longest in (2, 12):
        calls.clear()
        lit_lora("evaluate", data, trained, metrics="exact_match", max_new_tokens=longest)
        found.append((calls["of"], calls["_in_half_precision"]))
    assert found[0] == found[1]
    assert found[1][0] == LAYERS


def test_predict_rounds_them_once_for_a_batch(trained, calls):
    run = trained.parent
    lit_lora("predict", config=run / "config.yaml", ckpt_path="last", trainer__default_root_dir=run)
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == [*ANSWERS.values()]
    assert calls["of"] == LAYERS
