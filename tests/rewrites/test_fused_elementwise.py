"""Which norms and rotary positions get a kernel of their own, and that a model computes the same with them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from lit_lora import LoRAConfig, inject_lora
from lit_lora.build import make_trainable
from lit_lora.config import StepConfig
from lit_lora.kernels import elementwise
from lit_lora.kernels.cuda_way import as_on_cuda
from lit_lora.rewrites.fused_elementwise import fuse_elementwise
from tests.cuda_way import DEVICES, cuda_way
from tests.tiny import language_model

GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}


def _loss_and_gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    ids = torch.arange(3, 27, device=next(model.parameters()).device).view(2, 12)
    loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def _error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Relative, of all gradients together: in a model so small, rounding alone decides those of single matrices."""
    flat, exact_flat = (torch.cat([g[n].double().cpu().flatten() for n in exact]) for g in (got, exact))
    return float((flat - exact_flat).norm() / exact_flat.norm())


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("Llama", {}, (5, 2)),
        ("Qwen3", {"head_dim": 8}, (9, 2)),  # norms of queries and keys too
        ("Gemma2", GEMMA, (0, 2)),  # norms that multiply by one more than the weight
        ("GPTNeoX", {}, (0, 2)),  # LayerNorm, and positions in part of a head
        ("Cohere", {}, (0, 0)),  # positions that turn neighbours
        ("GPT2", {"n_positions": 64}, (0, 0)),
    ],
)
def test_what_has_the_formula_is_taken(kind, fields, expected):
    assert fuse_elementwise(language_model(kind, **fields)) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "fields"), [("Llama", {}), ("Qwen3", {"head_dim": 8}), ("Gemma2", GEMMA), ("GPTNeoX", {})]
)
def test_gradients_are_as_near_to_float64_as_the_models_own(kind, fields, dtype, device):
    with cuda_way(device):
        model = language_model(kind, std=0.1, **fields).to(device, dtype)
        inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
        exact = _loss_and_gradients(copy.deepcopy(model).cpu().double())
        plain = _error(_loss_and_gradients(model), exact)
        fuse_elementwise(model)
        # One draw of rounding against another: over eight seeds of this Llama the ratio lies between 0.8 and 1.9.
        assert _error(_loss_and_gradients(model), exact) <= 2.5 * plain


def test_another_default_device_does_not_disturb_the_trial():
    """As Lightning's Trainer sets it while a model is built."""
    with torch.device("meta"):
        assert fuse_elementwise(language_model()) == (5, 2)


def test_the_kernels_run_and_another_model_keeps_its_own(monkeypatch):
    calls = []
    for name in ("rms_norm", "rotate"):
        own = getattr(elementwise, name)
        monkeypatch.setattr(elementwise, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    models = [language_model().bfloat16().requires_grad_(False) for _ in range(2)]
    transformers_own = modeling_llama.apply_rotary_pos_emb
    fuse_elementwise(models[0])
    calls.clear()  # of the trial
    ids = torch.arange(3, 15)[None]
    for on_cuda in (True, False):
        with as_on_cuda() if on_cuda else nullcontext():
            models[1](input_ids=ids)
            assert calls == []
            models[0](input_ids=ids)
        assert sorted(calls) == ["rms_norm"] * 5 + ["rotate"] * 2
        calls.clear()
    models[0].float()(input_ids=ids)
    assert calls == ["rotate"] * 2
    with as_on_cuda():
        models[0](input_ids=ids)
    models[0].double()(input_ids=ids)
    assert calls == ["rotate"] * 2
    assert modeling_llama.apply_rotary_pos_emb is transformers_own


class _Scaled(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return 1.01 * super().forward(hidden_states)


class _OutsideEpsilon(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * hidden_states / (hidden_states.square().mean(-1, keepdim=True).sqrt() + 1e-5)


class _Refusing(modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        raise KeyError("it wants more")


class _Unbiased(nn.LayerNorm):
    """As MPT's: of the names that its class reads, one stands for no parameter."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = None


@pytest.mark.parametrize("kind", [_Scaled, _OutsideEpsilon, _Refusing, nn.LayerNorm, _Unbiased])
def test_a_norm_of_another_formula_is_left_alone(kind):
    assert fuse_elementwise(nn.Sequential(kind(16), modeling_llama.LlamaRMSNorm(16))) == (1, 0)


@pytest.mark.parametrize("change", ["trained", "other type"])
def test_a_norm_that_the_kernel_does_not_serve_computes_itself(change, monkeypatch):
    monkeypatch.setattr(elementwise, "rms_norm", lambda *_: pytest.fail("the kernel was called"))
    norm = modeling_llama.LlamaRMSNorm(16).bfloat16()
    assert fuse_elementwise(nn.Sequential(norm))[0] == 1
    norm.requires_grad_(change == "trained")
    x = torch.randn(3, 16).to(torch.float32 if change == "other type" else torch.bfloat16)
    with as_on_cuda():
        assert torch.equal(norm(x), modeling_llama.LlamaRMSNorm.forward(norm, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("fused_kernels", "on_cuda"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_build_takes_them_unless_told_otherwise(fused_kernels, on_cuda, dtype):
    model = language_model().to(dtype)
    if on_cuda:
        with as_on_cuda():
            make_trainable(model, LoRAConfig(), StepConfig(fused_kernels=fused_kernels))
    else:
        make_trainable(model, LoRAConfig(), StepConfig(fused_kernels=fused_kernels))
    norm: Any = model.model.norm
    layer = model.model.layers[0].self_attn.q_proj
    assert (
        ("forward" in vars(norm))
        == (layer.shared_input is not None)
        == (fused_kernels and (on_cuda or dtype is torch.bfloat16))
    )
    assert ("forward" in vars(model.model.layers[0].self_attn)) == fused_kernels
