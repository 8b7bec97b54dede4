"""``adapter_config.json`` as data: every configuration survives it, no content crashes the reader."""

from __future__ import annotations

import contextlib
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_lora import LoRAConfig
from lit_lora.interchange.peft_config import from_peft_config, to_peft_config


def test_an_old_configuration_with_few_keys_is_read_with_the_defaults_of_peft():
    config = from_peft_config({"peft_type": "LORA", "target_modules": ["q_proj"]})
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 8, 0.0)


names = st.text("abc_.", min_size=1, max_size=6)
configs = st.builds(
    LoRAConfig,
    r=st.integers(1, 256),
    lora_alpha=st.one_of(st.integers(1, 512), st.floats(0.1, 100)),
    lora_dropout=st.floats(0, 0.9),
    target_modules=st.one_of(names, st.lists(names, min_size=1)),
    exclude_modules=st.one_of(st.none(), names, st.lists(names, min_size=1)),
    modules_to_save=st.one_of(st.none(), st.lists(names, min_size=1)),
    layers_to_transform=st.one_of(st.none(), st.integers(0, 99), st.lists(st.integers(0, 99), min_size=1)),
    rank_pattern=st.dictionaries(names, st.integers(1, 64)),
    alpha_pattern=st.dictionaries(names, st.floats(0.1, 64)),
    use_rslora=st.booleans(),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configs)
def test_every_configuration_survives_the_file(config):
    content = json.loads(json.dumps(to_peft_config(config, "base")))
    assert from_peft_config(content) == config


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(to_peft_config(LoRAConfig(), None))), json_values, max_size=4))
def test_any_content_is_a_configuration_or_a_value_error(changes):
    with contextlib.suppress(ValueError):
        assert isinstance(from_peft_config({**to_peft_config(LoRAConfig(), None), **changes}), LoRAConfig)
