"""Attention of one new token, queries of a key head together: as torch computes it, and wherever it may."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from lit_lora.base.attention_choice import implementations
from lit_lora.language_model import answering_attention as module
from lit_lora.language_model.answering_attention import answering_attention, answering_attention_forward
from tests.tiny import language_model

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}
GROUPED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
}


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries that torch's function is given by the module."""
    found: list[torch.Size] = []

    def noted(query: Any, *args: Any, **options: Any) -> Any:
        found.append(query.shape)
        return F.scaled_dot_product_attention(query, *args, **options)

    class Functions:
        scaled_dot_product_attention = staticmethod(noted)

    monkeypatch.setattr(module, "F", Functions)
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("shape", [(3, 6, 2, 17, 8), (1, 4, 4, 5, 8), (2, 4, 1, 1, 16)])
def test_it_gives_what_torch_gives(shape, scaling, dtype, calls):
    rows, heads, keys, places, width = shape
    torch.manual_seed(0)
    query = torch.randn(rows, 1, heads, width, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(rows, keys, places + 3, width, dtype=dtype)[:, :, :places] for _ in range(2))
    got, weights = answering_attention_forward(torch.nn.Identity(), query, key, value, None, scaling=scaling)
    expected = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True).transpose(1, 2)
    assert weights is None
    assert calls == ([(rows, keys, heads // keys, width)] if heads != keys else [])
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_of_a_model_gives_the_same_logits(kind, padded, calls):
    model = language_model(kind, std=0.2, **GROUPED[kind]).eval()
    ids = torch.arange(3, 27).view(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 1 - int(padded)

    def logits() -> list[torch.Tensor]:
        cache, found = DynamicCache(config=model.config), []
        for start, end in ((0, 10), (10, 11), (11, 12)):
            options = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
            found.append(model(input_ids=ids[:, start:end], **options).logits[:, -1])
        return found

    with torch.no_grad():
        expected = logits()
        assert not calls
        with answering_attention(model):
            got = logits()
        assert len(calls) == (0 if padded else 2 * model.config.num_hidden_layers)
        assert implementations(model) == {"sdpa"}
    for here, there in zip(got, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["eager", None])
def test_another_attention_than_torchs_stays(name):
    model = language_model("Llama")
    if name is None:
        model.is_backend_compatible = lambda: False
    else:
        model.set_attn_implementation(name)
    before = implementations(model)
    with answering_attention(model):
        assert implementations(model) == before
