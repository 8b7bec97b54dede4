"""Which attention a card gets: by its capability, the type, and what this version of torch can be told.

Kernels of CUDA are stood in for by a readable one with the signatures that torch has had; which of them is called, with
what, is the same on a CPU. That the real ones give these values is tested in tests/cuda.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

from lit_lora import LoRAConfig, inject_lora
from lit_lora.base.load import resolve_dtype
from lit_lora.kernels import cuda_cards, varlen_attention
from lit_lora.language_model.attention import SeqLens, no_mask, packed_attention_forward
from lit_lora.language_model.trial import choose_path
from tests.tiny import language_model

T4, A100, L4, H100, B200, RTX_5090 = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
LENGTHS = [7, 12, 5]


def plain(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, left: int, scale: float | None) -> Tensor:
    """``(T, H, E)``: causal attention within each example."""
    out = []
    groups = q.shape[1] // k.shape[1]
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        rows = slice(start, stop)
        keys, values = (x[rows].repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k, v))
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        visible = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        out.append(F.scaled_dot_product_attention(q[rows].transpose(0, 1), keys, values, visible, scale=scale))
    return torch.cat(out, dim=1).transpose(0, 1)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    assert is_causal
    return plain(query, key, value, cu_seq_q, left=-1, scale=None)


def of_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0
    return plain(query, key, value, cu_seq_q, left=window_size[0], scale=scale)


def of_2_13(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return plain(query, key, value, cu_seq_q, left=window_size[0], scale=scale)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """What was called of torch: varlen or sdpa, with the arguments by name."""
    seen: list[tuple[str, dict[str, Any]]] = []
    sdpa = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(("sdpa", {"query": query, "key": key, **kwargs}))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr("lit_lora.language_model.attention.F.scaled_dot_product_attention", watched)
    parameters = varlen_attention._parameters
    yield seen
    parameters.cache_clear()


def use_version(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor], calls: list[Any]) -> None:
    """Let torch have the variable-length attention of another version."""

    @functools.wraps(function)
    def watched(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = list(calls)
        out = function(query, *args, **kwargs)
        calls[:] = [*before, ("varlen", {"query": query, **kwargs})]
        return out

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    varlen_attention._parameters.cache_clear()


def attend(dtype: torch.dtype, *, keys: int = 4, width: int = 16, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, sum(LENGTHS), width)
    q, k, v = (torch.randn(shape, generator=generator)[:, :heads].to(dtype) for heads in (4, keys, keys))
    offsets = torch.tensor([0, 7, 19, 24], dtype=torch.int32)
    lens, mask = SeqLens(LENGTHS), no_mask(q.device)
    module: Any = SimpleNamespace()
    return packed_attention_forward(module, q, k, v, mask, cu_seq_lens_q=offsets, seq_lens=lens, **options)[0]


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"scaling": 0.3}, {"scaling": 0.25}, {"keys": 2}])
@pytest.mark.parametrize("version", [of_2_10, of_2_11, of_2_13])
def test_each_version_of_torch_is_passed_what_it_takes(monkeypatch, calls, version, options):
    expected = attend(torch.bfloat16, **options)
    calls.clear()
    use_version(monkeypatch, version, calls)
    with cuda_cards.assumed(H100):
        got = attend(torch.bfloat16, **options)
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    inexpressible = version is of_2_10 and ("sliding_window" in options or options.get("scaling") == 0.3)
    assert any(name == "varlen" for name, _ in calls) is not inexpressible


@pytest.mark.parametrize(
    ("card", "dtype", "width", "kernel", "grouped"),
    [
        (None, torch.bfloat16, 16, "sdpa", False),
        (T4, torch.float16, 16, "sdpa", False),
        (T4, torch.bfloat16, 16, "sdpa", False),
        (A100, torch.bfloat16, 16, "varlen", True),
        (A100, torch.float16, 16, "varlen", True),
        (A100, torch.float32, 16, "sdpa", False),
        (L4, torch.bfloat16, 256, "varlen", True),
        (H100, torch.bfloat16, 20, "sdpa", True),
        (H100, torch.bfloat16, 264, "sdpa", False),
        (H100, torch.float64, 16, "sdpa", False),
        (B200, torch.bfloat16, 16, "varlen", True),
        (RTX_5090, torch.bfloat16, 16, "varlen", True),
    ],
)
def test_a_card_gets_the_kernel_that_it_has(monkeypatch, calls, card, dtype, width, kernel, grouped):
    """Grouped key heads go to FlashAttention alone: torch's other kernels leave them to one of quadratic memory."""
    monkeypatch.setattr("lit_lora.language_model.attention._of_a_cpu", lambda *_: None)
    use_version(monkeypatch, of_2_13, calls)
    with cuda_cards.assumed(card):
        attend(dtype, keys=2, width=width)
    assert {name for name, _ in calls} == {kernel}
    if kernel == "sdpa":
        assert {call["key"].shape[1] for _, call in calls} == {2 if grouped else 4}
        assert {call["enable_gqa"] for _, call in calls} == {grouped}


@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"dropout": 0.1}])
def test_what_the_kernel_cannot_do_takes_another_way(monkeypatch, calls, options):
    use_version(monkeypatch, of_2_13, calls)
    with cuda_cards.assumed(H100):
        attend(torch.bfloat16, **options)
    assert "varlen" not in {name for name, _ in calls}


def test_queries_are_in_autocasts_type_before_a_kernel_is_chosen(monkeypatch, calls):
    use_version(monkeypatch, of_2_13, calls)
    with cuda_cards.assumed(H100), torch.autocast("cpu", torch.bfloat16):
        attend(torch.float32)
    assert [(name, call["query"].dtype) for name, call in calls] == [("varlen", torch.bfloat16)]


def test_an_error_in_our_call_is_no_limit_of_the_model(monkeypatch):
    """Version 2.11's missing enable_gqa once cost every run its packing, with one line in the log."""
    monkeypatch.setattr(varlen, "varlen_attn", of_2_11)
    monkeypatch.setattr(varlen_attention, "_parameters", lambda: frozenset({"window_size", "scale", "enable_gqa"}))
    model = language_model(num_attention_heads=2, num_key_value_heads=1).to(torch.bfloat16)
    inject_lora(model, LoRAConfig(r=4))
    with cuda_cards.assumed(H100), pytest.raises(TypeError, match="enable_gqa"):
        choose_path(model)


@pytest.mark.parametrize(
    ("card", "dtype"),
    [(None, "bfloat16"), (T4, "float16"), (A100, "bfloat16"), (L4, "bfloat16"), (H100, "bfloat16")],
)
def test_auto_is_a_type_that_the_card_computes_in(card, dtype):
    with cuda_cards.assumed(card):
        assert resolve_dtype("auto", torch.device("cuda")) == getattr(torch, dtype)
        assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
        assert resolve_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


def test_cudnn_is_left_out_where_a_model_is_on_cuda():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        cuda_cards.prepare_attention(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        cuda_cards.prepare_attention(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"sliding_window": 3}])
def test_scores_are_not_kept_for_the_backward_pass(options):
    kept: list[Tensor] = []
    q, k, v = (torch.randn(1, heads, 300, 8, requires_grad=True) for heads in (4, 2, 2))
    offsets, lens = torch.tensor([0, 300], dtype=torch.int32), SeqLens([300])
    module: Any = SimpleNamespace()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, _ = packed_attention_forward(
            module, q, k, v, no_mask(q.device), cu_seq_lens_q=offsets, seq_lens=lens, **options
        )
    assert max((x.numel() for x in kept), default=0) < 300 * 300
    out.sum().backward()
    assert q.grad is not None
