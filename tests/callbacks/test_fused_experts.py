"""A verdict says how much of a mixture has adapters, whichever library put them there."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest

from lit_lora import LoRAConfig, inject_lora
from lit_lora.callbacks._support.fused_experts import expert_coverage
from tests.tiny import language_model

pytestmark = pytest.mark.filterwarnings("ignore:not adapted")


def _ours(model: Any, **targets: Any) -> Any:
    inject_lora(model, LoRAConfig(r=2, **targets))
    return model


def _of_peft(model: Any, **targets: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))


@pytest.mark.parametrize("adapt", [_ours, _of_peft])
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({"target_modules": ["q_proj"]}, r"4 of 4 fused 3-D weights, \d+% of all parameters, have no adapter"),
        (
            {"target_modules": [], "target_parameters": ["experts.down_proj"]},
            r"2 of 4 fused 3-D weights, \d+% of all parameters, have no adapter",
        ),
        (
            {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
            "all 4 fused 3-D weights have adapters",
        ),
    ],
)
def test_it_counts_the_fused_weights(adapt, targets, expected):
    model = adapt(language_model("Mixtral", num_local_experts=4), **targets)
    found = expert_coverage(model)
    assert found is not None
    assert re.fullmatch(expected, found)


def test_a_model_without_experts_has_nothing_to_say():
    assert expert_coverage(_ours(language_model())) is None
