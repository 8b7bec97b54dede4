"""``lit-lora fit --help``: what people set first; the rest by part."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from dataclasses import fields

import pytest

from lit_lora import LoRAConfig, OptimizationConfig, QuantizationConfig, StepConfig
from lit_lora.__main__ import main

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIGS = {
    "model.lora": LoRAConfig,
    "model.quantization": QuantizationConfig,
    "model.optimization": OptimizationConfig,
    "model.step": StepConfig,
}


@pytest.fixture
def shown(capsys):
    def help_of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main([*arguments])
        assert not caught.value.code
        return capsys.readouterr().out

    return help_of


def texts(kind: type) -> dict[str, str]:
    """What stands below each field in the source."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


@pytest.mark.parametrize(("group", "kind"), CONFIGS.items())
def test_every_field_is_listed_with_its_explanation(shown, group, kind):
    listed = " ".join(shown("fit", "--help").split())
    explained = texts(kind)
    assert explained.keys() == {field.name for field in fields(kind)}
    for name, text in explained.items():
        entry = re.search(rf"--{re.escape(group)}\.{name} .*?(?= --|$)", listed)
        assert entry, name
        assert " ".join(text.replace("``", "").split()) in entry[0]


def test_it_is_short_and_says_where_the_rest_is(shown):
    first, whole = shown("fit", "--help"), shown("fit", "--help.all")
    assert len(first.splitlines()) < 320
    assert all(len(line) <= 80 for line in first.splitlines() if not line.startswith("  --"))
    assert "--trainer.max_steps" in first
    assert "--trainer.detect_anomaly" not in first
    assert "--trainer.detect_anomaly" in whole
    assert "--convergence.min_decrease" in shown("fit", "--help.convergence")
    for part in re.search(r"shows the rest: ([\w, \n]+)\.", first)[1].replace("\n", " ").split(", "):
        assert f"--{part}." in shown("fit", f"--help.{part}")


def test_a_part_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help.convergance"])
    assert caught.value.code == 2
    assert "no part 'convergance'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_the_first_page_says_how_to_silence_a_run(shown, verb):
    assert re.search(r"^  --quiet  true\|false \(false\)\n        print the verdict only", shown(verb, "--help"), re.M)
