"""Each kind of model that is written as GGUF, with random weights: logits of llama.cpp are those of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lit_lora.evaluation.load import load
from lit_lora.tools.export import export
from tests.small_adapters import LLAMA3, MODELS, small_adapter

llama_cpp = pytest.importorskip("llama_cpp", reason="make consumers installs it")
pytestmark = pytest.mark.consumers

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **MODELS,
    "Llama, llama3 positions": ("Llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 512}),
    "Llama, linear positions": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    ),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, heads of another size": ("Llama", {"head_dim": 32}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "sizes"), KINDS.values(), ids=KINDS)
def test_logits_there_are_those_of_the_unmerged_model_here(kind, sizes, tmp_path):
    adapter = small_adapter(tmp_path, kind, **sizes)
    export(adapter, str(tmp_path / "model.gguf"), to="gguf", gguf_type="f32")
    there = llama_cpp.Llama(
        str(tmp_path / "model.gguf"), n_ctx=128, logits_all=True, verbose=False, type_k=0, type_v=0, n_threads=1
    )
    tokenizer = load(adapter).tokenizer
    ids = tokenizer("Water there falls: " * 5)["input_ids"]
    assert there.tokenize(tokenizer.decode(ids).encode(), add_bos=True, special=True) == ids
    there.eval(ids)
    with torch.no_grad():
        expected = load(adapter).model(torch.tensor([ids])).logits[0]
    got = torch.from_numpy(np.array(there.scores[: len(ids)]))
    assert (got - expected).abs().max() < 1e-3 * expected.abs().max()
