"""What a fit refuses, its estimate refuses with the same words, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_lora.base.load import load_base_model
from lit_lora.build import make_trainable
from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig
from lit_lora.memory.estimate import estimate_memory
from tests.memory.test_memory import saved_config

MAMBA: dict[str, Any] = {"state_size": 8, "hidden_size": 64}

REFUSED = {
    "a weight that Mamba reads": ("Mamba", MAMBA, {"exclude_modules": ["out_proj"]}, {}, "dt_proj cannot be adapted"),
    "a layer that PEFT does not load": ("Mamba", MAMBA, {"exclude_modules": ["dt_proj"]}, {}, "out_proj cannot be"),
    "both": ("Mamba", MAMBA, {}, {}, "dt_proj cannot be adapted"),
    "no such layer": ("Llama", {}, {"target_modules": ["q_prj"]}, {}, "q_prj"),
    "no such decoder layer": ("Llama", {}, {"layers_to_transform": [99]}, {}, "99"),
    "nothing to skip": (
        "Llama", {}, {}, {"quantization": QuantizationConfig(skip_modules=["nowhere"], block_size=32)}, "nowhere"
    ),
    "more layers than there are": ("Llama", {}, {}, {"step": StepConfig(recompute=99)}, "99"),
}  # fmt: skip

ACCEPTED = {
    "Mamba without them": ("Mamba", MAMBA, {"exclude_modules": ["dt_proj", "out_proj"]}, {}),
    "Llama": ("Llama", {}, {}, {}),
}


def said(run: Any) -> str | None:
    try:
        run()
    except ValueError as error:
        return str(error)
    return None


def by_fit_and_estimate(
    folder: Path, kind: str, fields: dict[str, Any], lora: dict[str, Any], options: dict[str, Any]
) -> tuple[str | None, str | None]:
    base, config = saved_config(folder, kind, **fields), LoRAConfig(r=4, **lora)

    def fit() -> None:
        model = load_base_model(base, quantization=options.get("quantization"))
        make_trainable(model, config, options.get("step", StepConfig()))

    return said(fit), said(lambda: estimate_memory(base, lengths=(20, 12), lora=config, **options))


@pytest.mark.parametrize("case", REFUSED)
def test_an_estimate_refuses_what_its_fit_refuses(case, tmp_path):
    *settings, expected = REFUSED[case]
    fit, estimate = by_fit_and_estimate(tmp_path, *settings)
    assert fit is not None
    assert expected in fit
    assert estimate == fit


@pytest.mark.parametrize("case", ACCEPTED)
def test_an_estimate_accepts_what_its_fit_accepts(case, tmp_path):
    assert by_fit_and_estimate(tmp_path, *ACCEPTED[case]) == (None, None)
