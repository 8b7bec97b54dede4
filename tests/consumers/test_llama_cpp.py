"""GGUF files of the real SmolLM2-135M-Instruct in llama.cpp: token for token what transformers generates.

``make consumers`` builds llama-cpp-python from its source package and runs these.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_lora import LoRAConfig, inject_lora, load_base_model, load_tokenizer, save_adapter
from lit_lora.adapters.layers import lora_layers
from lit_lora.evaluation.drift import measure_drift
from lit_lora.evaluation.load import load
from lit_lora.tools.export import export

llama_cpp = pytest.importorskip("llama_cpp", reason="make consumers installs it")
pytestmark = [pytest.mark.consumers, pytest.mark.real_model, pytest.mark.timeout(1800)]

NUM_PROMPTS, NUM_TOKENS = 20, 16
F32 = 0
"""ggml's number of float32: keys and values are float16 by default."""


@pytest.fixture(scope="module")
def adapter(real_model, tmp_path_factory) -> str:
    """Of two ranks and scales that do not follow from them, and large enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter")
    model = load_base_model(real_model, dtype="float32")
    torch.manual_seed(0)
    inject_lora(model, LoRAConfig(r=8, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 4}))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.factors()[1], std=0.01)
    save_adapter(model, folder, tokenizer=load_tokenizer(real_model))
    return str(folder)


@pytest.fixture(scope="module")
def prompts(real_model, requests) -> list[list[int]]:
    tokenizer = load_tokenizer(real_model)
    rows = [json.loads(line) for line in requests.read_text().splitlines()[:NUM_PROMPTS]]
    texts = [next(turn["content"] for turn in row["messages"] if turn["role"] == "user") for row in rows]
    asked = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(a, add_generation_prompt=True, return_dict=False) for a in asked]


@pytest.fixture(scope="module")
def expected(adapter, prompts) -> list[list[int]]:
    """Of the unmerged model in transformers."""
    model = load(adapter, dtype="float32").model
    return [_greedy(model, prompt) for prompt in prompts]


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=2,
        pad_token_id=2, repetition_penalty=1.0, temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


def _llama(path: Path, **options: Any) -> Any:
    return llama_cpp.Llama(str(path), n_ctx=1024, verbose=False, type_k=F32, type_v=F32, n_threads=1, **options)


def _greedy_there(model: Any, prompt: list[int]) -> list[int]:
    made: list[int] = []
    model.reset()
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0, top_k=1):
        made.append(token)
        if token == model.token_eos() or len(made) == NUM_TOKENS:
            break
    return made


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_the_merged_model_generates_token_for_token_there(kind, adapter, prompts, expected, tmp_path):
    export(adapter, str(tmp_path / "model.gguf"), to="gguf", gguf_type=kind)
    model = _llama(tmp_path / "model.gguf")
    tokenizer = load(adapter).tokenizer
    for prompt, tokens in zip(prompts, expected, strict=True):
        text = tokenizer.decode(prompt)
        assert model.tokenize(text.encode(), add_bos=True, special=True) == prompt
        assert _greedy_there(model, prompt) == tokens
    assert len({tuple(tokens) for tokens in expected}) > NUM_PROMPTS // 2
    assert tokenizer.decode(model.token_eos()) == "<|im_end|>"


def test_the_adapter_alone_does_so_on_the_base(real_model, adapter, prompts, expected, tmp_path):
    none = load_base_model(real_model, dtype="float32")
    inject_lora(none, LoRAConfig(r=1, target_modules=["q_proj"]))
    save_adapter(none, tmp_path / "none", tokenizer=load_tokenizer(real_model))  # its B is zero
    export(str(tmp_path / "none"), str(tmp_path / "base.gguf"), to="gguf", gguf_type="f32")
    export(adapter, str(tmp_path / "adapter.gguf"), to="gguf", gguf_type="f32", adapter_only=True)
    bare = _llama(tmp_path / "base.gguf")
    differing = sum(_greedy_there(bare, prompt) != tokens for prompt, tokens in zip(prompts, expected, strict=True))
    assert differing > NUM_PROMPTS // 2
    model = _llama(tmp_path / "base.gguf", lora_path=str(tmp_path / "adapter.gguf"))
    assert [_greedy_there(model, prompt) for prompt in prompts] == expected


def test_q8_0_drifts_by_as_much_as_eight_bits_do(adapter, prompts, tmp_path):
    export(adapter, str(tmp_path / "model.gguf"), to="gguf", gguf_type="q8_0")
    there, here = _llama(tmp_path / "model.gguf", logits_all=True), load(adapter, dtype="float32").model
    got, reference = [], []
    for prompt in prompts:
        there.reset()
        there.eval(prompt)
        got.append(torch.from_numpy(np.array(there.scores[: len(prompt)])))
        with torch.no_grad():
            reference.append(here(torch.tensor([prompt])).logits[0])
    drift = measure_drift(reference, got)
    print(f"q8_0 in llama.cpp against the unmerged model in float32: {drift}")
    assert 1e-7 < drift.kl < 0.02
    assert drift.top1 > 0.95
    assert math.isfinite(drift.max_abs)
