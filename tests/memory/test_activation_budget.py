from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from lit_lora.adapters.inject import inject_lora
from lit_lora.base.quantize import quantize_
from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig
from lit_lora.language_model.forward import ForwardPath, language_model_loss, placeholder_batch
from lit_lora.language_model.trial import choose_path
from lit_lora.memory.activation_budget import budget_bytes, layers_to_checkpoint, measure_activations
from lit_lora.memory.storage_tracker import StorageTracker
from lit_lora.memory.traced_step import run_step
from lit_lora.module import LoRALightningModule
from lit_lora.rewrites.recompute import checkpoint_layers
from tests.tiny import config, language_model

TOKENS = 256
SHAPES: dict[str, dict[str, Any]] = {
    "narrow": {"num_hidden_layers": 6},
    "wide": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5},
}


def adapted(shape: str, quantized: bool = False) -> PreTrainedModel:
    model = language_model(**SHAPES[shape])
    if quantized:
        quantize_(model, QuantizationConfig(block_size=32))
    inject_lora(model, LoRAConfig(r=4))
    choose_path(model)  # selects packed attention
    return model.train()


def activation_peak(model: PreTrainedModel) -> int:
    """Most bytes of activations and gradients in flight that a real step holds."""
    tracker = StorageTracker(model)
    path = choose_path(model)
    batch = placeholder_batch([TOKENS], packed=True, device="cpu")
    with tracker:
        with torch.no_grad():  # everything that the base stores is used once, so that it counts as base
            language_model_loss(model, batch, path)
        tracker.claim("base")
        run_step(model, batch, path, tracker)
    backward = tracker.peak("backward").by_category
    return max(
        tracker.peak("forward").by_category["activations"],
        backward.get("activations", 0) + backward.get("workspace", 0),
    )


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_stay_within_the_budget(shape: str, quantized: bool) -> None:
    measured = measure_activations(adapted(shape, quantized), TOKENS)
    most, least = measured.needed(0), measured.needed(len(measured.layers))
    assert least < most
    chosen = []
    for share in (1.0, 0.6, 0.0):
        budget = least + int(share * (most - least))
        model = adapted(shape, quantized)
        num_layers = layers_to_checkpoint(model, TOKENS, budget)
        checkpoint_layers(model, num_layers)
        assert activation_peak(model) <= budget * 1.01
        chosen.append(num_layers)
    assert chosen[0] == 0
    assert 0 < chosen[1] < chosen[2]


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = adapted("narrow")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    measure_activations(model, TOKENS)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


LONGROPE: dict[str, Any] = {
    "pad_token_id": 0, "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    },
}  # fmt: skip


def test_what_a_model_notes_on_itself_while_it_is_measured_is_undone() -> None:
    """Rotary frequencies of long rows, here without values: the next step would trip over them."""
    model = language_model("Phi3", **LONGROPE)
    inject_lora(model, LoRAConfig(r=4))
    measure_activations(model, 40)
    for module in model.modules():
        assert not any(isinstance(value, FakeTensor) for value in (*vars(module).values(), *module._buffers.values()))
    model(input_ids=torch.arange(40)[None])


@pytest.mark.filterwarnings("ignore:not adapted")
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Bloom", {}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("GptOss", {"head_dim": 8, "num_local_experts": 4}),
        ("Mamba", {"state_size": 8}),
    ],
)
def test_other_architectures_are_measured_as_they_are_run(kind: str, fields: dict[str, Any]) -> None:
    model = language_model(kind, **fields)
    unadaptable = ["dt_proj", "out_proj"] if kind == "Mamba" else None  # its kernels read their weights
    inject_lora(model, LoRAConfig(r=4, exclude_modules=unadaptable))
    measured = measure_activations(model, 64, choose_path(model))
    assert len(measured.layers) == 2
    assert measured.needed(2) < measured.needed(0)


def test_a_chunk_bounds_the_example_that_is_measured() -> None:
    path = ForwardPath(packed=True, direct_head=True, reason="", packed_up_to=20)
    model = adapted("narrow")
    whole = measure_activations(model, 50)
    assert measure_activations(model, 50, path).layers == whole.layers


def test_a_model_that_needs_values_is_refused_with_what_to_do() -> None:
    model = language_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ValueError, match=r"in modeling_rope_utils\.py, line \d+\): set recompute to true"):
        measure_activations(model, 40)


@pytest.mark.parametrize("num_layers", [1, 3, 6])
def test_recomputing_some_layers_changes_neither_loss_nor_gradients(num_layers: int) -> None:
    def loss_and_gradients(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = adapted("narrow")
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        path = choose_path(model)
        checkpoint_layers(model, count)
        batch = placeholder_batch([20, 12], packed=True, device="cpu")
        batch["input_ids"] = torch.arange(32).remainder(97)[None]
        batch["position_ids"] = torch.cat([torch.arange(20), torch.arange(12)])[None]
        batch["cu_seq_lens"] = torch.tensor([0, 20, 32], dtype=torch.int32)
        loss = language_model_loss(model, batch, path).nll_sum
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    (loss, gradients), (other_loss, other_gradients) = loss_and_gradients(0), loss_and_gradients(num_layers)
    assert torch.equal(loss, other_loss)
    assert len(gradients) == len(other_gradients) > 0
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-6, atol=1e-7)


def test_a_budget_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"with all 6 layers recomputed, recompute allows 0 MB: raise it"):
        layers_to_checkpoint(adapted("narrow"), TOKENS, 1000)


def test_auto_is_what_is_free_less_what_is_reserved() -> None:
    free = budget_bytes("auto", torch.device("cpu"), 0)
    assert free > 0
    assert budget_bytes("auto", torch.device("cpu"), 10**15) == 0
    assert budget_bytes("2GiB", torch.device("cpu"), 10**15) == 2**31


def test_training_within_a_budget_gives_the_same_adapters(tmp_path: Path) -> None:
    """And a later, larger batch makes more layers recomputed."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(num_hidden_layers=6).to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    batches = []
    for lengths in ((40, 20), (45, 40)):
        batch = placeholder_batch(lengths, packed=True, device="cpu")
        batch["input_ids"] = torch.arange(sum(lengths)).remainder(97)[None]
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        batch["cu_seq_lens"] = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        batch["target_positions"] = torch.arange(sum(lengths) - 2)
        batch["target_ids"] = batch["target_positions"].remainder(89)
        batches.append(batch)

    def train(**settings: Any) -> LoRALightningModule:
        module = LoRALightningModule(f"random:{path}", lora=LoRAConfig(r=4), step=StepConfig(**settings))
        trainer = L.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        torch.manual_seed(0)
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(module, loader)
        return module

    plain = train()
    measured = measure_activations(plain.model, 60)  # type: ignore[arg-type]
    budget = measured.needed(2)
    budgeted = train(recompute=str(budget))
    assert budgeted._activation_budget is not None
    assert budgeted._activation_budget.num_layers > 2
    for name, parameter in plain.trainable_parameters().items():
        torch.testing.assert_close(budgeted.trainable_parameters()[name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("recompute", "said"), [("lots", "expected an amount of memory"), (-1, "at least 0 layers")])
def test_what_cannot_be_recomputed_is_refused(recompute: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StepConfig(recompute=recompute)
