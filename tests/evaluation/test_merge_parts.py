"""Merging a layer at a time: bit for bit what merging in memory gives, of every kind of adapter and base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_base_model, save_adapter
from lit_lora.adapters.layers import adapter_modules
from lit_lora.adapters.trainable_tokens import TrainableTokens
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.base.vocabulary import grow_vocabulary
from lit_lora.evaluation import merge as merging
from lit_lora.evaluation.merge import merge
from lit_lora.tools.merge import merge as merge_verb
from tests.tiny import language_model


class Case(NamedTuple):
    """A base and an adapter for it."""

    lora: dict[str, Any]
    kind: str = "Llama"
    sizes: dict[str, Any] = {}  # noqa: RUF012 (a tuple's field)
    merge: dict[str, Any] = {}  # noqa: RUF012
    rows: int = 0
    """That the adapter's model has more than the base."""
    whole: str = ""
    """Why it has to be in memory as a whole."""


LINEAR = {"target_modules": "all-linear"}
HALF = {"merge": {"dtype": "bfloat16"}}
TIED: dict[str, Any] = {"sizes": {"tie_word_embeddings": True}}
CASES: dict[str, Case] = {
    "linear": Case(LINEAR),
    "linear, half": Case(LINEAR, **HALF),
    "ranks": Case({"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True}, **TIED),
    "embedding": Case({"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": Case({"target_modules": ["embed_tokens", "q_proj"]}, **TIED),
    "tied head": Case({"target_modules": ["lm_head"]}, **TIED),
    "saved": Case({"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "input_layernorm"]}),
    "saved and tied": Case(
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}, **TIED
    ),
    "rows": Case({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tied rows": Case({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, **TIED, **HALF),
    "new rows": Case({"target_modules": ["q_proj"], "trainable_token_indices": [3, 260, 261]}, rows=2),
    "new tied rows": Case({"target_modules": ["q_proj"], "trainable_token_indices": [260]}, **TIED, **HALF, rows=1),
    "new rows in full": Case({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, rows=2),
    "DoRA": Case({**LINEAR, "use_dora": True}, "Qwen2"),
    "DoRA, tied embedding": Case({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, **TIED, **HALF),
    "biases": Case({**LINEAR, "bias": "all"}, "Qwen2"),
    "Conv1D": Case({"target_modules": ["c_attn", "wte"], "bias": "lora_only"}, "GPT2", {"n_positions": 1024}),
    "Gemma": Case(LINEAR, "Gemma3Text", {"head_dim": 8}),
    "experts": Case(
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "experts that transformers fuses": Case(
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
        "Mixtral",
        {"num_local_experts": 4},
        whole="transformers stores other tensors than the model has",
    ),
    "quantized base": Case(LINEAR, merge={"quantization": QuantizationConfig(), "into": "base"}),
    "chosen by KL": Case(LINEAR, merge={"quantization": QuantizationConfig()}, **TIED),
    "chosen by KL, half, tied embedding": Case(
        {"target_modules": ["embed_tokens", "q_proj"]},
        merge={"quantization": QuantizationConfig(), "dtype": "bfloat16"},
        **TIED,
    ),
    "chosen by KL, biases": Case({**LINEAR, "bias": "all"}, "Qwen2", merge={"quantization": QuantizationConfig()}),
    "dequantized": Case(LINEAR, merge={"quantization": QuantizationConfig(), "into": "dequantized"}, **TIED),
    "dequantized Conv1D": Case(
        {"target_modules": ["c_attn"]},
        "GPT2",
        {"n_positions": 1024, "hidden_size": 64},
        {"quantization": QuantizationConfig(double_quant=True), "into": "dequantized", "dtype": "bfloat16"},
    ),
    "8-bit embedding": Case(
        LINEAR, merge={"quantization": QuantizationConfig(embedding_bits=8)}, whole="its embedding is held in 8 bits"
    ),
    "4 bits again": Case(
        LINEAR, merge={"quantization": QuantizationConfig(), "into": "4bit"}, whole="the result is quantized whole"
    ),
}


def _made(case: Case, folder: Path) -> str:
    """An adapter with values that matter, on a base of several files; its folder."""
    sizes = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 3, **case.sizes}
    base = language_model(case.kind, std=0.2, **sizes)
    base.save_pretrained(folder / "base", max_shard_size="100KB")
    assert len(list((folder / "base").glob("*.safetensors"))) > 2
    byte_tokenizer().save_pretrained(folder / "base")
    model = load_base_model(str(folder / "base"))
    grow_vocabulary(model, 260 + case.rows)
    torch.manual_seed(1)
    inject_lora(model, LoRAConfig(**{"r": 4, "init_lora_weights": False, **case.lora}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".copy." in name or name.endswith("bias") or "magnitude" in name):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for _, module in adapter_modules(model):
        if isinstance(module, TrainableTokens) and module.tied_to is None:
            module.rows_KD.data.normal_()
    save_adapter(model, folder / "adapter")
    return str(folder / "adapter")


def _written(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    texts = {path.name: path.read_text() for path in folder.glob("*.json") if ".index." not in path.name}
    return tensors, texts


@pytest.mark.filterwarnings("ignore:not adapted:UserWarning")
@pytest.mark.filterwarnings("ignore:merging into 4 bits rounds:UserWarning")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_layer_at_a_time_gives_what_merging_in_memory_gives(case, tmp_path, monkeypatch):
    adapter = _made(case, tmp_path)
    by_parts = merge(adapter, tmp_path / "parts", num_samples=2, **case.merge)
    assert by_parts.whole == case.whole
    monkeypatch.setattr(merging, "open_base", lambda *_, **__: "it is to be compared")
    in_memory = merge(adapter, tmp_path / "whole", num_samples=2, **case.merge)
    got, expected = _written(tmp_path / "parts"), _written(tmp_path / "whole")
    assert got[0].keys() == expected[0].keys()
    differing = [n for n, t in expected[0].items() if t.dtype != got[0][n].dtype or not torch.equal(t, got[0][n])]
    assert differing == []
    assert got[1] == expected[1]
    assert by_parts.drifts.keys() == in_memory.drifts.keys()
    assert by_parts.into == in_memory.into
    assert by_parts.tried == pytest.approx(in_memory.tried, rel=0.05, abs=1e-3)
    assert bool(by_parts.tried) == ("quantization" in case.merge and case.merge.get("into", "auto") == "auto")
    if by_parts.tried:
        assert by_parts.tried[by_parts.into] == pytest.approx(min(by_parts.tried.values()), abs=1e-6)
        written = by_parts.drifts[merging.ON_QUANTIZED].kl
        assert written == pytest.approx(by_parts.tried[by_parts.into], rel=1e-3, abs=1e-6)
    for name, drift in in_memory.drifts.items():
        assert by_parts.drifts[name].num_tokens == drift.num_tokens
        assert by_parts.drifts[name].kl == pytest.approx(drift.kl, rel=0.05, abs=1e-3 if case.merge else 1e-6)
    if not case.whole:
        index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected[0].values())
    before = load_base_model(str(tmp_path / "base")).state_dict()
    same = [n for n, t in got[0].items() if n in before and torch.equal(t.float(), before[n].float())]
    assert len(same) < len(got[0])
    assert len(got[0].get("model.embed_tokens.weight", [])) in (0, 260 + case.rows)


def test_what_is_held_at_a_time_is_a_layer(tmp_path, monkeypatch):
    adapter = _made(Case(LINEAR), tmp_path)
    held: list[int] = []
    merge_part = merging.merge_lora

    def watched(model: Any) -> None:
        held.append(sum(p.nbytes for p in model.parameters() if not p.is_meta))
        merge_part(model)

    monkeypatch.setattr("lit_lora.evaluation.merge_parts.merge_lora", watched)
    merge(adapter, tmp_path / "merged", num_samples=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
    assert len(held) == 3  # the adapter has nothing outside of the layers
    assert max(held) < 1.3 * largest
    assert largest < 0.4 * sum(p.nbytes for p in model.parameters())


def test_choosing_holds_a_layer_at_a_time_too(tmp_path, monkeypatch):
    adapter = _made(Case(LINEAR), tmp_path)
    held: list[int] = []
    merge_part = merging.merge_lora

    def watched(model: Any) -> None:
        held.append(sum(p.nbytes for p in model.model.layers.parameters() if not p.is_meta))
        merge_part(model)

    monkeypatch.setattr("lit_lora.evaluation.merge_parts.merge_lora", watched)
    merge(adapter, tmp_path / "merged", num_samples=1, quantization=QuantizationConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(held) == 3 * 3  # to measure both, and to write one
    assert max(held) < 1.3 * max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)


def test_the_verb_says_how_the_base_was_read(tmp_path, capsys):
    adapter = _made(Case(LINEAR), tmp_path)
    merge_verb(adapter, str(tmp_path / "parts"), num_samples=1)
    assert "one layer in memory at a time" in capsys.readouterr().out
    quantization = QuantizationConfig(embedding_bits=8)
    merge_verb(adapter, str(tmp_path / "whole"), num_samples=1, quantization=quantization)
    assert "with the whole base in memory: its embedding is held in 8 bits" in capsys.readouterr().out
