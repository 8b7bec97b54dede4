"""Architectures: some in every run of the tests, all of them with ``pytest --sweep`` (``make sweep``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sweep.compare import compare
from tests.sweep.report import page
from tests.sweep.sweep import architectures, run_all

pytestmark = pytest.mark.filterwarnings("ignore:not adapted")  # fused experts, of which adapters know nothing yet

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 64, "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
}  # fmt: skip
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
}  # fmt: skip

# model type, fields, packed, loss from hidden states, because
SOME: list[tuple[str, dict[str, Any], bool, bool, str]] = [
    ("llama", {}, True, True, ""),
    ("llama", {"tie_word_embeddings": True}, True, True, ""),
    ("llama", {"hidden_act": "gelu", "attention_dropout": 0.5}, True, True, "dropout of its own"),
    ("mistral", {"sliding_window": 8}, True, True, ""),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, True, True, ""),
    ("gemma2", {}, True, False, "not its head applied"),
    ("gemma3_text", {}, True, True, ""),
    ("llama4", {}, False, False, "of 8 tokens, is told by the mask alone"),
    ("gpt_oss", {}, False, True, "its attention takes s_aux"),
    ("qwen3_moe", {}, True, True, ""),
    ("mixtral", {}, True, True, ""),
    ("phimoe", {}, True, True, ""),
    ("deepseek_v3", {}, True, True, ""),
    ("bloom", {}, False, True, "its attention cannot be chosen"),
    ("mpt", {}, False, True, "its attention cannot be chosen"),
    ("falcon", {}, False, True, "its attention cannot be chosen"),
    ("gpt2", {}, True, True, ""),
    ("gpt_neo", {}, False, True, "its attention cannot be chosen"),
    ("opt", {}, True, True, ""),
    ("cohere", {"logit_scale": 0.5}, True, False, "not its head applied"),
    ("granite", {"logits_scaling": 4.0}, True, False, "not its head applied"),
    ("phi", {}, True, False, "the output head has a bias"),
    ("mamba", {}, False, True, "its attention cannot be chosen"),
    ("recurrent_gemma", {}, False, False, "its attention cannot be chosen"),
    ("falcon_h1", {}, False, False, "it would change the model's outputs"),
    ("lfm2", {}, True, True, ""),
    ("roberta", {}, False, False, "it would change the model's outputs"),
]


@pytest.mark.parametrize(
    ("model_type", "fields", "packed", "direct_head", "reason"),
    SOME,
    ids=[f"{name}-{'-'.join(fields)}" for name, fields, *_ in SOME],
)
def test_loss_and_gradients_are_the_models_own(model_type, fields, packed, direct_head, reason):
    result = compare(model_type, **fields)
    assert result.status == "equal", result
    assert result.path is not None
    assert (result.path.packed, result.path.direct_head) == (packed, direct_head), str(result.path)
    assert reason in result.path.reason


@pytest.mark.parametrize(
    ("model_type", "fields"), [("phi3", LONGROPE), ("llama", DYNAMIC)], ids=["longrope", "dynamic"]
)
def test_rotary_frequencies_that_depend_on_length_are_those_of_a_padded_batch(model_type, fields):
    result = compare(model_type, alone=False, **fields)
    assert result.status == "equal", result
    assert result.path is not None
    assert result.path.packed
    assert compare(model_type, **fields).status == "different", "the lengths show no switch of frequencies"


@pytest.mark.parametrize("model_type", ["t5", "bart", "switch_transformers"])
def test_an_encoder_decoder_goes_through_the_hooks(model_type):
    result = compare(model_type, seq2seq=True)
    assert result.status == "equal", result


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_no_architecture_differs_silently():
    results = run_all(architectures())
    PAGE.write_text(page(results), encoding="utf-8")
    assert len(results) > 200
    different = {architecture: result for architecture, result in results.items() if result.status == "different"}
    assert not different
    assert sum(result.status == "equal" for result in results.values()) > 0.9 * len(results)
