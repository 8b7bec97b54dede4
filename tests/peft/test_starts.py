"""How A and B start: PEFT's numbers, training and files, on a base that stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lit_lora
from lit_lora import (
    LoRAConfig,
    LoRALightningModule,
    OptimizationConfig,
    QuantizationConfig,
    SFTDataModule,
    disable_lora,
    inject_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)
from lit_lora.adapters.initializers import INITIALIZERS
from lit_lora.adapters.layers import LoRALinear, lora_layers
from lit_lora.adapters.subtracted_start import start_tensors, started_layers
from lit_lora.base.quantize import quantize_
from lit_lora.callbacks import ConvergenceAssertion, TrainingCheckpoint
from lit_lora.config import LATER_STARTS
from lit_lora.interchange.adapter_state import adapter_state_dict
from lit_lora.interchange.peft_folder import read_tensors
from lit_lora.training.optimization import learns_faster
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]

IDS = torch.arange(24).view(2, 12) + 3
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
OF_PEFT = {
    "orthogonal": lambda layer: layer.orthogonal_init("default"),
    "pissa": lambda layer: layer.pissa_init("default", "pissa"),
    "pissa_niter_4": lambda layer: layer.pissa_init("default", "pissa_niter_4"),
    "pissa_niter_16": lambda layer: layer.pissa_init("default", "pissa_niter_16"),
    "olora": lambda layer: layer.olora_init("default"),
    "gaussian": lambda layer: layer.reset_lora_parameters("default", "gaussian"),
    True: lambda layer: layer.reset_lora_parameters("default", True),
}
"""``init_lora_weights`` -> how PEFT fills a layer."""


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_every_start_has_a_row() -> None:
    assert {*OF_PEFT, False, *LATER_STARTS} == INITIALIZERS.keys()


@pytest.mark.parametrize("start", OF_PEFT)
@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_and_b_start_as_in_peft_on_a_base_that_computes_what_it_did(start: Any, kind: str) -> None:
    settings = SETTINGS if kind == "Llama" else {**SETTINGS, "target_modules": ["c_attn", "c_proj"]}
    ours = language_model(kind)
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    expected = logits(ours)
    inject_lora(ours, LoRAConfig(**settings, init_lora_weights=start))
    theirs = peft.get_peft_model(language_model(kind), peft.LoraConfig(**settings)).base_model.model
    for name, layer in lora_layers(ours):
        assert isinstance(layer, LoRALinear)
        other = theirs.get_submodule(name)
        torch.manual_seed(5)
        INITIALIZERS[start](layer)
        torch.manual_seed(5)
        OF_PEFT[start](other)
        if start == "olora" and kind == "GPT2":  # PEFT takes the QR of a Conv1D's weight the wrong way round
            continue
        torch.testing.assert_close(layer.lora_A.weight, other.lora_A["default"].weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer.lora_B.weight, other.lora_B["default"].weight, atol=1e-6, rtol=1e-6)
        assert layer.lora_A.weight.any()
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=1e-4)
    held = dict(ours.named_parameters())
    assert all(torch.equal(held.get(name, held.get(_wrapped(name))), p) for name, p in before.items())


def _wrapped(name: str) -> str:
    owner, _, last = name.rpartition(".")
    return f"{owner}.base_layer.{last}"


def trained(model: nn.Module, steps: int = 3) -> list[torch.Tensor]:
    """Losses of a few steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.02), []
    for _ in range(steps):
        loss = model.eval()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")
@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_trains_as_in_peft_and_both_files_fit_the_original_base(start: Any, rslora: bool, tmp_path: Path) -> None:
    settings = {**SETTINGS, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 9}, "use_rslora": rslora}
    ours = language_model()
    inject_lora(ours, LoRAConfig(**settings, init_lora_weights=start))
    theirs = peft.get_peft_model(language_model(), peft.LoraConfig(**settings, init_lora_weights=start))
    if start == "orthogonal":
        for name, layer in lora_layers(ours):
            other = theirs.base_model.model.get_submodule(name)
            for half, parameter in zip(("lora_A", "lora_B"), layer.factors(), strict=True):
                parameter.data.copy_(getattr(other, half)["default"].weight)
    torch.testing.assert_close(torch.stack(trained(ours)), torch.stack(trained(theirs)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-3, rtol=1e-3)
    for portable in (False, True):
        save_adapter(ours, tmp_path / f"{portable}", portable=portable)
        by_peft = peft.PeftModel.from_pretrained(language_model(), str(tmp_path / f"{portable}"))
        torch.testing.assert_close(logits(by_peft), logits(ours), atol=1e-3, rtol=1e-3)
    again = language_model()
    load_adapter(again, tmp_path / "False")
    torch.testing.assert_close(logits(again), logits(ours), atol=1e-3, rtol=1e-3)
    with disable_lora(ours):
        assert torch.equal(logits(ours), logits(language_model()))
    expected = logits(ours)
    merge_lora(ours)
    torch.testing.assert_close(logits(ours), expected, atol=1e-3, rtol=1e-3)


def test_dropout_leaves_the_part_of_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model()
    inject_lora(model, LoRAConfig(**SETTINGS, init_lora_weights="pissa", lora_dropout=0.5))
    (_, layer), *_ = started_layers(model)
    with torch.no_grad():
        layer.lora_B.weight.add_(torch.randn_like(layer.lora_B.weight))
    x = torch.randn(3, 32)
    kept: list[torch.Tensor] = []
    dropout = torch.nn.functional.dropout

    def recorded(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kept.append(dropout(x, *args, **kwargs))
        return kept[-1]

    monkeypatch.setattr("torch.nn.functional.dropout", recorded)
    got = layer.train()(x)
    lora_A, lora_B = layer.factors()
    start_A, start_B = layer.starts()
    residual = layer.base_layer.weight - layer.scaling * start_B @ start_A
    expected = x @ residual.T + layer.scaling * kept[0] @ lora_A.T @ lora_B.T
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_quantized_base_stays_as_it_was(start: Any) -> None:
    model = language_model()
    quantize_(model, QuantizationConfig(block_size=32))
    before = logits(model)
    inject_lora(model, LoRAConfig(**SETTINGS, init_lora_weights=start))
    torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)
    assert all(layer.lora_A.weight.abs().sum() > 0 for _, layer in started_layers(model))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "is for linear layers, and model.embed_tokens"),
        ({"r": 40}, "has 32, r is 40"),
        ({"use_dora": True}, "use_dora does not work with init_lora_weights 'pissa'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "needs even ranks, got 3"),
        ({"init_lora_weights": "orthogonal", "target_modules": ["embed_tokens"]}, "is for linear layers"),
    ],
)
def test_what_cannot_start_so_is_refused_and_the_model_left_as_it_was(settings: dict[str, Any], named: str) -> None:
    model = language_model()
    with pytest.raises(ValueError, match=named):
        inject_lora(model, LoRAConfig(**{**SETTINGS, "init_lora_weights": "pissa", **settings}))
    assert not list(lora_layers(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_is_proved_resumed_bit_for_bit_and_written_for_the_original_base(tmp_path: Path) -> None:
    base = language_model("Llama", vocab_size=320)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say one", "completion": "yes"}\n' * 8)

    def fit(resume: str | None = None) -> dict[str, torch.Tensor]:
        module = LoRALightningModule(
            str(tmp_path / "base"), lora=LoRAConfig(r=4, init_lora_weights="pissa_niter_4"),
            optimization=OptimizationConfig(learning_rate=1e-3, lora_plus_ratio=4.0),
        )  # fmt: skip
        data = SFTDataModule(
            str(tmp_path / "rows.jsonl"), tokenizer="bytes", batch_size=2, cache_dir=tmp_path / "cache"
        )
        outcome = lit_lora.fit(
            module, data, tmp_path / "run", resume=resume, quiet=True, report=False, max_steps=4, accelerator="cpu",
            callbacks=[TrainingCheckpoint(every_n_steps=2), ConvergenceAssertion(-9.0)],
        )  # fmt: skip
        assert outcome is not None
        assert outcome.result == "proved", outcome
        assert [group["lr"] for group in module.trainer.optimizers[0].param_groups][1] >= 0
        return read_tensors(tmp_path / "run" / "adapter" / "adapter_model.safetensors")

    first = fit()
    again = fit(str(tmp_path / "run" / "checkpoints" / "step=00000002.ckpt"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    module = LoRALightningModule.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "step=00000004.ckpt")
    read = language_model("Llama", vocab_size=320)
    load_adapter(read, tmp_path / "run" / "adapter")
    assert module.model is not None
    torch.testing.assert_close(logits(module.model), logits(read), atol=1e-4, rtol=1e-4)
    assert start_tensors(module.model)
    assert {tensor.shape[0] for name, tensor in adapter_state_dict(read).items() if "lora_A" in name} == {8}


def test_lora_plus_has_the_groups_of_peft() -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    ours, theirs = language_model("Qwen2"), language_model("Qwen2")
    inject_lora(ours, LoRAConfig(**settings, bias="lora_only"))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings, bias="lora_only"))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=4.0, loraplus_lr_embedding=0.1
    )
    shapes = sorted((tuple(p.shape), group["lr"]) for group in optimizer.param_groups for p in group["params"])
    named = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    faster = {id(parameter) for parameter in learns_faster(named)}
    assert sorted((tuple(p.shape), 0.4 if id(p) in faster else 0.1) for p in named.values()) == shapes
    assert len(faster) == 6, "B of four layers, and the biases of two"
