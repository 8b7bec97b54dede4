"""Regular expressions against names: as ``re`` has it, and never for long."""

from __future__ import annotations

import re

import pytest

from lit_lora import LoRAConfig, inject_lora
from lit_lora.adapters import expressions
from lit_lora.adapters.expressions import find
from tests.tiny import language_model

NAMES = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(12) for part in "qkvo"] + ["lm_head", "a" * 60]


@pytest.mark.parametrize(
    "text",
    [
        "lm_head",
        "model.layers.1.self_attn.q_proj",
        r".*layers\.1\..*_proj",
        r".*layers\.(1|1[01])\.self_attn\.[qv]_proj",
        r"(?i)MODEL.*Q_PROJ",
        r"(?!model).*",
        r"(.)\1*",
        r".*(?<=attn\.)k_proj",
        "",
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_the_matches_are_those_of_re(text, whole):
    match = re.fullmatch if whole else re.match
    assert find("target_modules", {text: text}, NAMES, whole=whole)[text] == {n: "" for n in NAMES if match(text, n)}


def test_a_group_called_index_is_told():
    expression = r".*?layers\.(?P<index>\d+)\."
    found = find("layers_pattern", {"layers": expression}, NAMES)["layers"]
    assert found == {name: name.split(".")[2] for name in NAMES if "layers" in name}
    assert find("layers_pattern", {"(layers)": expression}, NAMES)["(layers)"] == found  # in the other process


HOSTILE = {
    "nested": r"(.*.*)*x!",
    "words": r"(\w+\.?)+!",
    "alternatives": r"(.|..)+!",
    "ahead": r"(?=(.*.*)*!).*",
}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *[("target_modules", text) for text in HOSTILE.values()],
        *[(f, HOSTILE["nested"]) for f in ("exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")],
    ],
)
@pytest.mark.timeout(60)
def test_an_expression_that_would_not_end_is_named(field, text, monkeypatch):
    monkeypatch.setattr(expressions, "LIMIT_S", 0.3)
    fields = {"target_modules": ["q_proj"], field: {text: 4} if field.endswith("_pattern") else text}
    if field == "layers_pattern":
        fields |= {"layers_pattern": text, "layers_to_transform": [0]}
    model = language_model()
    with pytest.raises(
        ValueError, match=rf"{field}: matching {re.escape(repr(text))} against .* takes more than 0.3 s"
    ):
        inject_lora(model, LoRAConfig(**fields))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "'\\(' is no regular expression: missing"),
        ("a{99999999999}", "is no regular expression: the repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "is no regular expression: maximum recursion depth"),
        ("((a{9999}){9999}){9999}", ""),
        ("a|" * 20_000, ""),
    ],
)
def test_an_expression_that_cannot_be_compiled_is_named_and_a_large_one_is_no_harm(text, message):
    if message:
        with pytest.raises(ValueError, match=f"rank_pattern: .*{message}"):
            find("rank_pattern", {text: text}, NAMES)
    else:
        assert set(find("rank_pattern", {text: text}, NAMES, whole=True)[text]) <= set(NAMES)


@pytest.mark.timeout(60)
def test_the_time_is_for_all_expressions_of_a_field_together(monkeypatch):
    monkeypatch.setattr(expressions, "LIMIT_S", 0.5)
    many = {f"x{i}": rf"(.*\.)?(x{i})$" for i in range(100_000)}
    with pytest.raises(ValueError, match=r"rank_pattern: matching 'x.*' .* takes more than 0.5 s"):
        find("rank_pattern", many, NAMES)


def test_memory_is_limited_too(monkeypatch, tmp_path):
    """The process says what ended it, whatever that was."""
    script = tmp_path / "script.py"
    script.write_text("raise MemoryError")
    monkeypatch.setattr(expressions, "__file__", str(script))
    with pytest.raises(ValueError, match=r"matching '\(a\)' .*: MemoryError"):
        find("target_modules", {"(a)": "(a)"}, NAMES)
