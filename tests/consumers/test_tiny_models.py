"""Each kind of model that is written as GGUF, with random weights: logits of llama.cpp are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_lora import LoRAConfig, inject_lora, load_base_model, save_adapter
from lit_lora.evaluation.load import load
from lit_lora.tools.export import export
from tests.small_adapters import LLAMA3, MODELS, RANKS, small_adapter

llama_cpp = pytest.importorskip("llama_cpp", reason="make consumers installs it")
pytestmark = [pytest.mark.consumers, pytest.mark.filterwarnings("ignore:not adapted:UserWarning")]

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "Llama, llama3 positions": ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 512}),
    "Llama, linear positions": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, heads of another size": ("Llama", {"head_dim": 32}),
    "Qwen3-MoE, experts adapted": (
        "Qwen3Moe", {**MODELS["Qwen3-MoE"][1], "lora": {**RANKS, "rank_pattern": {}, "target_parameters": EXPERTS}}
    ),
    "Gemma 3, linear positions": ("Gemma3Text", {**MODELS["Gemma 3"][1], "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}),
    "Phi-3, a part of each head rotated": (
        "Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}
    ),
    "GPT-NeoX, one after the other": ("GPTNeoX", {**MODELS["GPT-NeoX"][1], "use_parallel_residual": False}),
}  # fmt: skip


TABLES = {"Gemma 2", "Gemma 3", "Gemma 3, linear positions", "StarCoder2", "GPT-2", "GPT-NeoX", "BLOOM",
          "GPT-NeoX, one after the other"}  # fmt: skip
"""Those with GELU, which llama.cpp looks up on the CPU in a table of float16."""


def _llama(path: Path, **options: Any) -> Any:
    return llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1,
                           **options)  # fmt: skip


def _logits_there(model: Any, ids: list[int]) -> torch.Tensor:
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def _distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("kind", "sizes"), KINDS.values(), ids=KINDS)
def test_logits_there_are_those_of_the_unmerged_model_here(kind, sizes, tmp_path, request):
    name = request.node.callspec.id
    adapter = small_adapter(tmp_path, kind, **sizes)
    export(adapter, str(tmp_path / "model.gguf"), to="gguf", gguf_type="f32")
    there = _llama(tmp_path / "model.gguf")
    tokenizer = load(adapter).tokenizer
    ids = tokenizer("Water there falls: " * 5)["input_ids"]
    assert there.tokenize(tokenizer.decode(ids).encode(), add_bos=True, special=True) == ids
    with torch.no_grad():
        expected = load(adapter).model(torch.tensor([ids])).logits[0]
    distance = _distance(_logits_there(there, ids), expected)
    print(f"{name}: {distance:.1e}")
    assert distance < (1e-3 if name in TABLES else 2e-5)


@pytest.mark.parametrize(("kind", "sizes"), MODELS.values(), ids=MODELS)
def test_so_are_those_of_the_base_there_with_the_adapter_on_it(kind, sizes, tmp_path, request):
    adapter = small_adapter(tmp_path, kind, **sizes)
    none = load_base_model(str(tmp_path / "base"))
    inject_lora(none, LoRAConfig(r=1, target_modules="all-linear"))
    tokenizer = load(adapter).tokenizer
    save_adapter(none, tmp_path / "none", tokenizer=tokenizer)  # its B is zero
    export(str(tmp_path / "none"), str(tmp_path / "base.gguf"), to="gguf", gguf_type="f32")
    export(adapter, str(tmp_path / "adapter.gguf"), to="gguf", gguf_type="f32", adapter_only=True)
    ids = tokenizer("Water there falls: " * 5)["input_ids"]
    with torch.no_grad():
        expected = load(adapter).model(torch.tensor([ids])).logits[0]
    there = _llama(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf"))
    assert _distance(_logits_there(there, ids), expected) < (1e-3 if request.node.callspec.id in TABLES else 2e-5)
    assert _distance(_logits_there(_llama(tmp_path / "base.gguf"), ids), expected) > 0.05


@pytest.mark.parametrize("gguf_type", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["Mixtral", "GPT-2", "Gemma 2"])
def test_files_of_fewer_bits_are_read(name, gguf_type, tmp_path):
    kind, sizes = MODELS[name]
    adapter = small_adapter(tmp_path, kind, **sizes)
    export(adapter, str(tmp_path / "model.gguf"), to="gguf", gguf_type=gguf_type)
    ids = load(adapter).tokenizer("Water there falls: ")["input_ids"]
    with torch.no_grad():
        expected = load(adapter).model(torch.tensor([ids])).logits[0]
    assert _distance(_logits_there(_llama(tmp_path / "model.gguf"), ids), expected) < 0.15
