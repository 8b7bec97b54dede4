"""Values of the settings: converted to what a file can hold, or refused when they are set."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.initializers import INITIALIZERS
from tests.tiny import language_model

CONVERTED: list[tuple[Any, str, Any, Any]] = [
    (LoRAConfig, "r", np.int64(4), 4),
    (LoRAConfig, "lora_alpha", 16, 16),
    (LoRAConfig, "lora_alpha", np.float32(0.5), 0.5),
    (LoRAConfig, "lora_alpha", np.int32(3), 3),
    (LoRAConfig, "lora_alpha", Fraction(1, 2), 0.5),
    (LoRAConfig, "lora_dropout", np.float64(0.25), 0.25),
    (LoRAConfig, "lora_dropout", 0, 0),
    (LoRAConfig, "target_modules", {"v_proj", "q_proj", "k_proj"}, ["k_proj", "q_proj", "v_proj"]),
    (LoRAConfig, "target_modules", frozenset({"v_proj", "q_proj"}), ["q_proj", "v_proj"]),
    (LoRAConfig, "target_modules", ("v_proj", "q_proj"), ["v_proj", "q_proj"]),
    (LoRAConfig, "target_modules", {"v_proj": 1, "q_proj": 2}.keys(), ["q_proj", "v_proj"]),
    (LoRAConfig, "target_modules", {1: "v_proj", 2: "q_proj"}.values(), ["v_proj", "q_proj"]),
    (LoRAConfig, "target_modules", np.array(["v_proj", "q_proj"]), ["v_proj", "q_proj"]),
    (LoRAConfig, "target_modules", np.str_("q_proj"), "q_proj"),
    (LoRAConfig, "target_modules", (name for name in ["v_proj", "q_proj"]), ["v_proj", "q_proj"]),
    (LoRAConfig, "exclude_modules", {"mlp"}, ["mlp"]),
    (LoRAConfig, "modules_to_save", ("lm_head",), ["lm_head"]),
    (LoRAConfig, "layers_to_transform", range(2), [0, 1]),
    (LoRAConfig, "layers_to_transform", {1, 0}, [0, 1]),
    (LoRAConfig, "layers_to_transform", np.arange(2), [0, 1]),
    (LoRAConfig, "layers_to_transform", np.int8(1), 1),
    (LoRAConfig, "rank_pattern", {np.str_("q_proj"): np.int64(2)}, {"q_proj": 2}),
    (LoRAConfig, "alpha_pattern", {"q_proj": np.float16(0.5)}, {"q_proj": 0.5}),
    (LoRAConfig, "adapter_dtype", torch.bfloat16, "bfloat16"),
    (LoRAConfig, "adapter_dtype", np.dtype("float16"), "float16"),
    (LoRAConfig, "init_lora_weights", np.str_("gaussian"), "gaussian"),
    (QuantizationConfig, "bits", np.int64(8), 8),
    (QuantizationConfig, "block_size", np.int64(128), 128),
    (QuantizationConfig, "compute_dtype", torch.float16, "float16"),
    (QuantizationConfig, "skip_modules", {"b", "a"}, ["a", "b"]),
    (QuantizationConfig, "embedding_bits", np.int16(8), 8),
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"), CONVERTED, ids=[f"{c[1]}={type(c[2]).__name__}" for c in CONVERTED]
)
def test_a_value_becomes_the_plain_one_that_a_file_holds(kind, name, value, expected):
    config = kind(**{name: value})
    got = getattr(config, name)
    assert got == expected
    assert type(got) is type(expected)
    assert kind(**json.loads(json.dumps(asdict(config)))) == config


LISTS = ["q_proj", b"q_proj", {"q_proj": 1}, ["q_proj", 1], [""], [None], 3, True]
REFUSED: dict[tuple[Any, str], list[Any]] = {
    (LoRAConfig, "r"): ["8", 8.0, True, None, [8], 0, np.bool_(True), torch.tensor(8), float("nan")],
    (LoRAConfig, "lora_alpha"): ["16", True, None, float("nan"), float("inf"), 10**400, 1j, torch.tensor(1.0)],
    (LoRAConfig, "lora_dropout"): ["0.1", True, None, 1.0, -0.1, float("nan")],
    (LoRAConfig, "target_modules"): [None, *LISTS[1:], "", []],
    (LoRAConfig, "exclude_modules"): [*LISTS[1:], ""],
    (LoRAConfig, "modules_to_save"): LISTS,
    (LoRAConfig, "trainable_token_indices"): [
        "1",
        [1.0],
        ["1"],
        [True],
        {"a": 1},
        {1: [1]},
        [],
        [-1],
        [1, 1],
        {"a": []},
    ],
    (LoRAConfig, "target_parameters"): LISTS,
    (LoRAConfig, "layers_to_transform"): ["1", 1.0, True, [1.0], ["1"], [True], {0: 1}],
    (LoRAConfig, "layers_pattern"): [*LISTS[1:], "", "layers"],
    (LoRAConfig, "rank_pattern"): [None, ["q_proj"], {"q_proj": "2"}, {"q_proj": 0}, {"q_proj": 2.0}, {1: 2}, {"": 2}],
    (LoRAConfig, "alpha_pattern"): [None, {"q_proj": "2"}, {"q_proj": float("nan")}, {"q_proj": True}, {1: 2.0}],
    (LoRAConfig, "use_rslora"): ["true", 1, None, np.bool_(True)],
    (LoRAConfig, "bias"): ["some", None, True, ["all"]],
    (LoRAConfig, "ensure_weight_tying"): ["true", 1, None],
    (LoRAConfig, "use_dora"): ["true", 1, None, np.bool_(True)],
    (LoRAConfig, "eva_rho"): [0.5, "2", True, None, float("nan"), float("inf"), 2.0],
    (LoRAConfig, "freeze_A"): ["true", 1, None],
    (LoRAConfig, "lora_bias"): ["true", 1, None],
    (LoRAConfig, "init_lora_weights"): ["mica", 1, None, "", np.bool_(True), torch.float32],
    (LoRAConfig, "adapter_dtype"): ["half", "int8", torch.float64, torch.int8, None, 32],
    (QuantizationConfig, "bits"): ["4", 5, True, None, [4]],
    (QuantizationConfig, "quant_type"): ["nf3", None, 4],
    (QuantizationConfig, "double_quant"): [1, "true", None],
    (QuantizationConfig, "block_size"): ["64", 64.0, True, None, 48, 16, 8192],
    (QuantizationConfig, "compute_dtype"): ["half", torch.int8, None],
    (QuantizationConfig, "skip_modules"): LISTS,
    (QuantizationConfig, "embedding_bits"): [4, "8", True],
}
"""``layers_pattern`` has no effect without ``layers_to_transform``, whatever it is."""


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        pytest.param(*key, value, id=f"{key[1]}={str(value)[:20]!r}")
        for key, values in REFUSED.items()
        for value in values
    ],
)
def test_what_is_not_of_a_field_is_refused_by_its_name(kind, name, value):
    with pytest.raises(ValueError, match=name):
        kind(**{name: value})


def test_the_tables_cover_every_field():
    every = {(kind, field.name) for kind in (LoRAConfig, QuantizationConfig) for field in fields(kind)}
    assert REFUSED.keys() == every


def test_a_configuration_does_not_change_with_the_list_that_it_was_made_of():
    names = ["q_proj"]
    config = LoRAConfig(target_modules=names)
    names.append("nonsense")
    assert config.target_modules == ["q_proj"]


def test_every_start_can_be_set():
    for start in INITIALIZERS:
        assert LoRAConfig(init_lora_weights=start).init_lora_weights == start  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": {"q_proj", "v_proj"}},
        {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",), "r": np.int64(2)},
        {"target_modules": frozenset({"q_proj"}), "layers_to_transform": range(1), "lora_alpha": np.float32(3)},
        {
            "target_modules": "all-linear",
            "exclude_modules": {"mlp", "down_proj"},
            "alpha_pattern": {"q_proj": np.int8(3)},
        },
    ],
)
def test_what_can_be_set_can_be_trained_and_exported(fields: dict[str, Any], tmp_path: Path):
    ids = torch.arange(3, 17).view(2, 7)
    model = language_model()
    inject_lora(model, LoRAConfig(**{"r": 4, "init_lora_weights": False, **fields}))
    save_adapter(model, tmp_path)
    read = language_model()
    load_adapter(read, tmp_path)
    assert torch.equal(read(ids).logits, model(ids).logits)
