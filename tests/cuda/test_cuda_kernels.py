"""On a GPU: packed attention and its memory, values and gradients against the padded way, 4-bit decoding."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from lit_lora import LoRAConfig, QuantizationConfig, inject_lora, load_base_model
from lit_lora.adapters.layers import lora_layers
from lit_lora.base.quantize import quantize_
from lit_lora.callbacks._support.norms import gradient_norms
from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.kernels import cuda_cards, varlen_attention
from lit_lora.language_model.attention import SeqLens, _per_example, no_mask, packed_attention_forward
from lit_lora.language_model.forward import language_model_loss
from lit_lora.language_model.trial import choose_path
from tests.tiny import config, examples, language_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # other versions of libraries
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]
CUDA = torch.device("cuda")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _without_cudnn():
    cuda_cards.prepare_attention(CUDA)


@pytest.fixture
def varlen_calls(monkeypatch) -> list[torch.dtype]:
    seen: list[torch.dtype] = []
    function = varlen.varlen_attn

    @functools.wraps(function)
    def watched(query, *args, **kwargs):
        seen.append(query.dtype)
        return function(query, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    return seen


def _batch(collate, lengths=(7, 30, 5, 64)):
    made = [
        TokenizedExample(i, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
        for i, (ids, mask) in enumerate(examples(lengths))
    ]
    batch = collate(made)
    return {name: x.to(CUDA) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


def _loss_and_gradients(model, batch, path):
    model.zero_grad()
    loss = language_model_loss(model, batch, path).nll_sum
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("options", "key_heads", "width"),
    [({}, 8, 64), ({}, 2, 64), ({"sliding_window": 9}, 2, 64), ({"scaling": 0.3}, 4, 128), ({}, 4, 256)],
)
def test_variable_length_attention_equals_each_example_alone(dtype, options, key_heads, width, varlen_calls):
    torch.manual_seed(0)
    lengths, module = [7, 130, 1, 64], SimpleNamespace()
    shapes = [(1, heads, sum(lengths), width) for heads in (8, key_heads, key_heads)]
    exact = [torch.randn(shape, device=CUDA).to(dtype).float().requires_grad_() for shape in shapes]
    half = [x.detach().to(dtype).requires_grad_() for x in exact]
    offsets = torch.tensor([0, 7, 137, 138, 202], dtype=torch.int32, device=CUDA)
    mask: Any = no_mask(CUDA)
    seq = {"cu_seq_lens_q": offsets, "seq_lens": SeqLens(lengths)}
    got, _ = packed_attention_forward(module, *half, mask, **seq, **options)
    scaling, window = options.get("scaling"), options.get("sliding_window")
    expected = _per_example(*exact, lengths, 0, scaling, 0.0, window, None)
    assert varlen_calls == [dtype]
    torch.testing.assert_close(got.float(), expected, rtol=2e-2, atol=2e-2)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, half, grad.to(dtype)), torch.autograd.grad(expected, exact, grad), strict=True
    ):
        assert float((a.float() - b).norm() / b.norm()) < 2e-2


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {}),
        ("Mistral", {"sliding_window": 4}),
        ("Qwen2", {}),
        ("Gemma2", {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, None, 1e-4),
        (torch.float32, torch.bfloat16, 0.05),
        (torch.bfloat16, None, 0.05),
        (torch.float16, None, 0.02),
    ],
)
def test_packed_equals_padded(kind, fields, dtype, autocast, tolerance, varlen_calls):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = language_model(kind, std=0.05, **{**sizes, **fields}).to(CUDA, dtype)
    if kind == "Gemma2":
        model.set_attn_implementation("eager")  # some versions' default leaves the cap out
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    model.train()
    path = choose_path(model)
    assert path.packed, str(path)
    varlen_calls.clear()
    with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
        loss, gradients = _loss_and_gradients(model, _batch(collate_packed), path)
        assert bool(varlen_calls) == ((autocast or dtype) in HALVES and kind != "Gemma2")  # which caps scores
        other, expected = _loss_and_gradients(model, _batch(collate_padded), path)
    assert float((loss - other).abs() / other) < tolerance
    assert float((gradients - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(("dtype", "limit_mib"), [(torch.float32, 400), (torch.bfloat16, 100)])
def test_memory_of_grouped_attention_grows_with_the_tokens(dtype, limit_mib):
    """32 heads over 2048 tokens: a square of scores would be 512 MiB in float32, and there are several of them."""
    query = torch.randn(1, 32, 2048, 64, device=CUDA, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, 8, 2048, 64, device=CUDA, dtype=dtype, requires_grad=True) for _ in range(2))
    offsets, module = torch.tensor([0, 2048], dtype=torch.int32, device=CUDA), SimpleNamespace()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = packed_attention_forward(
        module, query, key, value, no_mask(CUDA), cu_seq_lens_q=offsets, seq_lens=SeqLens([2048])
    )
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < limit_mib * 2**20


def test_a_model_that_is_loaded_leaves_cudnn_attention_out(tmp_path):
    config("Llama").save_pretrained(tmp_path)
    torch.backends.cuda.enable_cudnn_sdp(True)
    model = load_base_model(f"random:{tmp_path}", device="cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert model.dtype == cuda_cards.half_dtype(CUDA)


def _kernels(function) -> list[str]:
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def test_packed_attention_is_launched_once_however_many_examples():
    counts = set()
    for lengths in ([512], [16] * 32):
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=CUDA)
        x = torch.randn(1, 8, 512, 64, device=CUDA, dtype=torch.bfloat16)
        assert varlen_attention.serves(x, x, scaling=None, window=None)
        counts.add(
            len(
                _kernels(
                    lambda x=x, offsets=offsets: varlen_attention.varlen_attention(
                        x, x, x, offsets, 512, scaling=None, window=None
                    )
                )
            )
        )
    assert len(counts) == 1


def test_a_token_that_is_generated_dequantizes_no_weight():
    model = language_model(hidden_size=256, intermediate_size=512, num_attention_heads=4).to(CUDA, torch.bfloat16)
    quantize_(model, QuantizationConfig())
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    model.eval()
    layer = next(layer for _, layer in lora_layers(model))
    x = torch.randn(1, 1, layer.in_features, device=CUDA, dtype=torch.bfloat16)
    rows = torch.cat([x] * 64, dim=1)
    with torch.no_grad():
        names = _kernels(lambda: layer(x))
        assert names
        assert not [name for name in names if "equantize" in name]
        assert [name for name in _kernels(lambda: layer(rows)) if "equantize" in name], "the name is another now"
        one, many = layer(x).float(), layer(rows)[:, :1].float()
        assert float((one - many).norm() / many.norm()) < 2e-2


def test_norms_of_float64_and_float32_gradients_are_taken_together():
    parameters = [torch.nn.Parameter(torch.ones(3, device=CUDA, dtype=d)) for d in (torch.float64, torch.float32)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    grads = [parameter.grad for parameter in parameters]
    torch.testing.assert_close(gradient_norms(grads, 2.0).tolist(), [12**0.5] * 2)
