"""``lit-lora harness`` without the harness; ``tests/consumers/test_harness.py`` runs it where it is installed."""

from __future__ import annotations

import sys

import pytest

from lit_lora.__main__ import main
from lit_lora.evaluation.harness import table

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


def test_without_the_harness_the_extra_is_named_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SystemExit, match="1"):
        main(["harness", "arc_easy", "--base", "nowhere"])
    assert "pip install 'lit-lora[harness]'" in capsys.readouterr().err


def test_models_stand_side_by_side_with_their_errors():
    base = {"a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.125, "sample_len": 9, "f1,strict": 0.25,
                  "f1_stderr,strict": "N/A"}}  # fmt: skip
    adapter = {"a": {**base["a"], "acc,none": 0.75}}
    assert table({"base": base, "adapter": adapter}).splitlines() == [
        "task  metric       base             adapter",
        "a     acc          0.5000 ± 0.1250  0.7500 ± 0.1250",
        "a     f1 (strict)  0.2500           0.2500",
    ]
