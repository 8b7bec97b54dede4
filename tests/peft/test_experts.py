"""Fused experts of mixtures: PEFT's ``target_parameters``, with its values, gradients, files and merge."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lit_lora import LoRAConfig, disable_lora, inject_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from lit_lora.adapters.layers import adapter_modules
from lit_lora.interchange.peft_format import adapter_state_dict
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:not adapted"),
    # PEFT compares patterns with modules only here, although it applies them to parameters.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]

IDS = torch.arange(3, 24).view(3, 7)
TOLERANCE = 2e-5
"""Of the largest value, where that is above 1."""

_DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 16, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
_QWEN = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**_QWEN, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {**_QWEN, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": _DEEPSEEK,
    "Llama4Text": {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 64, "use_qk_norm": False},
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "beside layers": {"target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH, "use_rslora": True},
    "one": {"target_parameters": ["experts.down_proj"]},
    "patterns": {
        "target_parameters": BOTH,
        "rank_pattern": {"down_proj": 2, r"layers\.1\..*gate_up_proj": 5},
        "alpha_pattern": {"gate_up_proj": 3},
    },
    "biases and a full name": {
        "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj", "experts.gate_up_proj_bias"]
    },
    "router": {"target_parameters": ["gate.weight", "experts.gate_up_proj"]},
}
IMPLEMENTATIONS = ["grouped_mm", "batched_mm", "eager"]
CASES = [
    *((kind, "both", way) for kind in MODELS for way in IMPLEMENTATIONS if kind != "Llama4Text" or way == "eager"),
    *(("Mixtral", name, "grouped_mm") for name in ("beside layers", "one", "patterns", "router")),
    *(("Qwen3Moe", name, "eager") for name in ("beside layers", "one", "patterns", "router")),
    *(("GptOss", name, "grouped_mm") for name in ("one", "patterns", "biases and a full name")),
]
each_case = pytest.mark.parametrize(("kind", "name", "way"), CASES)


def _base(kind: str, way: str = "grouped_mm") -> Any:
    model = language_model(kind, **MODELS[kind])
    if kind != "Llama4Text":
        model.set_experts_implementation(way)
    return model


def _config(name: str) -> dict[str, Any]:
    return {"r": 4, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False, **CONFIGS[name]}


def _peft_model(kind: str, name: str, way: str) -> Any:
    torch.manual_seed(4)
    config = peft.LoraConfig(**_config(name), task_type="CAUSAL_LM")
    return peft.get_peft_model(_base(kind, way), config, autocast_adapter_dtype=False)


def _assert_equal(got: torch.Tensor, expected: torch.Tensor, what: str = "logits") -> None:
    assert (got - expected).abs().max() < TOLERANCE * max(1, expected.abs().max()), what


@each_case
def test_values_gradients_and_tensors_are_those_of_peft(kind, name, way, tmp_path):
    theirs = _peft_model(kind, name, way).train()
    theirs.save_pretrained(tmp_path)
    ours = _base(kind, way)
    load_adapter(ours, tmp_path, trainable=True)
    expected = theirs(input_ids=IDS, labels=IDS)
    got = ours.train()(input_ids=IDS, labels=IDS)
    _assert_equal(got.logits, expected.logits)
    assert (_base(kind, way)(IDS).logits - expected.logits).abs().max() > 1e-2
    expected.loss.backward()
    got.loss.backward()
    gradients = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert mine.keys() == gradients.keys() == adapter_state_dict(ours).keys()
    for key, gradient in gradients.items():
        assert gradient.abs().max() > 0
        _assert_equal(mine[key], gradient, key)
    save_adapter(ours, tmp_path / "ours")
    written, read = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "ours", tmp_path))
    assert written.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())


@each_case
def test_peft_reads_what_we_write(kind, name, way, tmp_path):
    torch.manual_seed(5)
    ours = _base(kind, way)
    inject_lora(ours, LoRAConfig(**_config(name)))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_base(kind, way), tmp_path)
    _assert_equal(theirs(input_ids=IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_merging_equals_merging_with_peft_and_is_undone(kind, tmp_path):
    way = "eager" if kind == "Llama4Text" else "grouped_mm"
    theirs = _peft_model(kind, "both", way).eval()
    theirs.save_pretrained(tmp_path)
    ours, base = _base(kind, way), _base(kind, way)
    load_adapter(ours, tmp_path)
    adapted = ours(IDS).logits
    merge_lora(ours, unload=False)
    _assert_equal(ours(IDS).logits, adapted)
    unmerge_lora(ours)
    assert torch.equal(ours(IDS).logits, adapted)
    with disable_lora(ours):
        assert torch.equal(ours(IDS).logits, base(IDS).logits)
    merge_lora(ours)
    assert not list(adapter_modules(ours))
    assert ours.state_dict().keys() == base.state_dict().keys()
    merged = theirs.merge_and_unload().state_dict()
    for key, tensor in ours.state_dict().items():
        _assert_equal(tensor, merged[key], key)
