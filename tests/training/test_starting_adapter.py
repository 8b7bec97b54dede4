"""Training that starts from an adapter: as PEFT computes it, resumed without its folder, refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lit_lora
from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, QuantizationConfig, SFTDataModule
from lit_lora.base.trained_on import read_record
from lit_lora.callbacks import ConvergenceAssertion, TrainingCheckpoint
from lit_lora.report.outcome import read_outcome
from tests.tiny import language_model

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ranks and rsLoRA": ("Llama", {"r": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": True, "lora_dropout": 0.5}),
    "DoRA": ("Llama", {"r": 3, "use_dora": True, "target_modules": ["v_proj", "down_proj"]}),
    "biases": ("Qwen2", {"r": 2, "bias": "lora_only"}),
    "rows and a head": (
        "Llama",
        {"r": 2, "trainable_token_indices": {"embed_tokens": [101, 115]}, "modules_to_save": ["lm_head"]},
    ),
    "experts": (
        "Mixtral",
        {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


def written_by_peft(folder: Path, kind: str, settings: dict[str, Any]) -> tuple[str, str, torch.Tensor]:
    """A base, an adapter of PEFT for it that changes everything it may, and its logits."""
    extra = {"num_local_experts": 4} if kind == "Mixtral" else {}
    base = language_model(kind, vocab_size=320, initializer_range=0.1, **extra)
    base.save_pretrained(folder / "base")
    config = peft.LoraConfig(**{"lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings})
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(24).view(2, 12)).logits
    return str(folder / "base"), str(folder / "adapter"), logits


def rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"say {i}", "completion": "yes " * (i % 3 + 1)}) + "\n" for i in range(8))
    )
    return str(path)


def trained(base: str, adapter: str, data: str, run: Path, resume: Path | None = None, **settings: Any) -> Path:
    module = LoRALightningModule(base, adapter=adapter, optimization=OptimizationConfig(learning_rate=1e-2), **settings)
    source = SFTDataModule(data, tokenizer="bytes", batch_size=2, cache_dir=run.parent / "cache")
    lit_lora.fit(
        module, source, run, resume=None if resume is None else str(resume), quiet=True, report=False, max_steps=4,
        accelerator="cpu", callbacks=[TrainingCheckpoint(every_n_steps=2), ConvergenceAssertion(-9.0)],
    )  # fmt: skip
    return run


@pytest.mark.parametrize("case", CASES)
def test_training_starts_from_what_peft_computes(case: str, tmp_path: Path) -> None:
    base, adapter, expected = written_by_peft(tmp_path, *CASES[case])
    module = LoRALightningModule(base, adapter=adapter)
    module.configure_model()
    assert module.model is not None
    module.model.eval()
    with torch.no_grad():
        logits = module.model(input_ids=torch.arange(24).view(2, 12)).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert module.trainable_parameters()
    assert module.lora.lora_dropout == 0.0, "how an adapter is trained is set anew"


@pytest.mark.parametrize(
    ("case", "bits"),
    [("DoRA", 4), ("biases", None), ("rows and a head", None), ("rows and a head", 4), ("experts", None)],
)
def test_a_run_resumes_without_the_folder_that_it_started_from(case: str, bits: int | None, tmp_path: Path) -> None:
    quantization = QuantizationConfig(block_size=32) if bits else None
    base, adapter, _ = written_by_peft(tmp_path, *CASES[case])
    data = rows(tmp_path)
    run = trained(base, adapter, data, tmp_path / "run", quantization=quantization, lora=LoRAConfig(lora_dropout=0.0))
    outcome, before = read_outcome(run), load_file(run / "adapter" / "adapter_model.safetensors")
    assert outcome is not None
    assert outcome.result == "proved", outcome
    record = read_record(run / "adapter" / "adapter_model.safetensors")
    assert outcome.adapter == record.started_from
    assert len(outcome.adapter) == 64
    started = load_file(Path(adapter) / "adapter_model.safetensors")
    assert before.keys() == {key.replace(".token_adapter.base_layer", "") for key in started}
    assert not any(torch.equal(before[key], started[key]) for key in before), "every tensor of the start moved"

    shutil.rmtree(adapter)
    shutil.rmtree(run / "adapter")
    checkpoint = run / "checkpoints" / "step=00000002.ckpt"
    trained(base, adapter, data, run, resume=checkpoint, quantization=quantization)
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_record(run / "adapter" / "adapter_model.safetensors") == record
    again = LoRALightningModule.load_from_checkpoint(run / "checkpoints" / "step=00000004.ckpt")
    assert again.lora.r == CASES[case][1]["r"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"r": 16}, "r=16"), ({"use_dora": True}, "use_dora"), ({"target_modules": ["o_proj"]}, "target_modules"),
     ({"init_lora_weights": "gaussian"}, "init_lora_weights")],
)  # fmt: skip
def test_settings_that_contradict_the_adapter_are_named(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    base, adapter, _ = written_by_peft(tmp_path, *CASES["biases"])
    module = LoRALightningModule(base, adapter=adapter, lora=LoRAConfig(**settings))
    with pytest.raises(ValueError, match=rf"{named}.* contradicts the adapter in "):
        module.configure_model()
    for modules in (["q_proj", "v_proj"], ["v_proj", "q_proj"]):  # PEFT writes them in any order
        lora = LoRAConfig(r=2, lora_alpha=6, bias="lora_only", target_modules=modules)
        LoRALightningModule(base, adapter=adapter, lora=lora).configure_model()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = written_by_peft(tmp_path / "one", *CASES["DoRA"])
    run = trained(base, adapter, rows(tmp_path), tmp_path / "run")
    other, _, _ = written_by_peft(tmp_path / "two", "Llama", {"r": 1})
    language_model("Llama", vocab_size=320, seed=5).save_pretrained(other)
    with pytest.raises(ValueError, match=r"was trained on .* Give base= as in training|model.base as in training|base"):
        LoRALightningModule(other, adapter=str(run / "adapter")).configure_model()
    LoRALightningModule(base, adapter=str(run / "adapter")).configure_model()


def test_a_missing_adapter_is_refused_before_the_base_is_loaded(tmp_path: Path) -> None:
    module = LoRALightningModule("random:nothing", adapter=str(tmp_path / "adapter"))
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        module.configure_model()
