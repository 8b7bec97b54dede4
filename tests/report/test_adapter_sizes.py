"""Norms of what an adapter adds, against the matrices themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora.adapters.inject import inject_lora
from lit_lora.adapters.layers import LoRALinear
from lit_lora.config import LoRAConfig
from lit_lora.interchange.peft_format import save_adapter
from lit_lora.report.adapter_sizes import layer_updates
from tests.tiny import language_model


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.*q_proj": 2}, "use_rslora": True},
        {"target_modules": ["v_proj"], "alpha_pattern": {"v_proj": 3.0}},
    ],
)
def test_sizes_are_those_of_the_matrices(fields: dict[str, Any], tmp_path: Path) -> None:
    model = language_model("Llama", tie_word_embeddings=False)
    inject_lora(model, LoRAConfig(r=4, lora_alpha=8, **fields))
    torch.manual_seed(0)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B.weight)
    save_adapter(model, tmp_path)
    found = {update.name: update for update in layer_updates(tmp_path)}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        a, b = layer.lora_A.weight.detach().double(), layer.lora_B.weight.detach().double()
        update = found[name]
        assert update.norm_a == pytest.approx(float(a.norm()))
        assert update.norm_b == pytest.approx(float(b.norm()))
        assert update.norm_update == pytest.approx(float((layer.scaling * b @ a).norm()))
        assert f"layers.{update.layer}." in name
        assert name.endswith(update.kind)
