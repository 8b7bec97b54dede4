"""The model card names what was trained, in a form that the Hub reads."""

from __future__ import annotations

import pytest
import yaml

from lit_lora import LoRAConfig
from lit_lora.interchange.model_card import is_hub_id, model_card


def _card(base="owner/base", **fields):
    return model_card(
        LoRAConfig(**fields),
        base_model_name=base,
        data="1,000 examples of a|b",
        hyperparameters={"learning rate": 2e-4, "steps": 100, "note": "a|b\n<script>"},
        results={"loss": 1.234567891},
    )


def test_front_matter_is_yaml_with_what_the_hub_reads():
    _, front, body = _card().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lit-lora"],
    }
    assert body.startswith("\n# LoRA adapter for owner/base\n")


def test_a_local_base_is_not_claimed_to_be_on_the_hub():
    assert "base_model:" not in _card("/models/base")
    assert "base_model:" not in _card(None)


def test_settings_and_results_are_tables_that_nothing_breaks():
    card = _card(target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"q_proj": 2})
    for line in (
        "| target modules | q_proj, v_proj |",
        "| scale | alpha / sqrt(rank) |",
        "| ranks | q_proj: 2 |",
        "| learning rate | 0.0002 |",
        "| note | a\\|b &lt;script> |",
        "| loss | 1.23457 |",
    ):
        assert line in card.splitlines()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", True), ("a/b-1.0", True), ("/a/b", False), ("a/b/c", False), ("../b", False), ("random:x", False)],
)
def test_hub_ids_are_told_from_folders(name, expected):
    assert is_hub_id(name) is expected
