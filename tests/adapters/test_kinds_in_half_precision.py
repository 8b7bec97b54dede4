"""Every kind of adapter on a base in half precision: built, trained a step, and near what float32 gives."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from lit_lora import LoRAConfig, StepConfig
from lit_lora.build import make_trainable
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.kernels.cuda_way import as_on_cuda
from lit_lora.language_model.forward import language_model_loss
from tests.tiny import examples, language_model

KINDS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.1},
    "dropout": {"lora_dropout": 0.1},
    "MLP alone": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "DoRA, MLP alone": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "use_dora": True},
    "biases": {"bias": "all"},
    "biases of its own": {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True},
    "biases of its own, dropout": {"target_modules": ["q_proj"], "lora_bias": True, "lora_dropout": 0.1},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA, embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "whole head": {"modules_to_save": ["lm_head"]},
    "rows": {"trainable_token_indices": [3, 5]},
    "half adapters": {"adapter_dtype": "bfloat16"},
}


def _step(kind, dtype):
    torch.manual_seed(0)
    model = language_model("Qwen2").to(dtype)  # with biases
    path = make_trainable(model, LoRAConfig(r=4, **KINDS[kind]), StepConfig()).path
    batch = collate_packed(
        [
            TokenizedExample(index, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
            for index, (ids, mask) in enumerate(examples())
        ]
    )
    torch.manual_seed(1)
    loss = language_model_loss(model, batch, path).nll_sum
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("on_cuda", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_base_in_bfloat16_is_near_that_in_float32(kind, on_cuda):
    loss, gradients = _step(kind, torch.float32)
    with as_on_cuda() if on_cuda else nullcontext():
        half_loss, half = _step(kind, torch.bfloat16)
    assert half.keys() == gradients.keys()
    assert abs(half_loss / loss - 1) < 0.02
    found = torch.cat([half[name].flatten().float() for name in gradients])
    expected = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert found.isfinite().all()
    assert (found - expected).norm() < 0.15 * expected.norm()
