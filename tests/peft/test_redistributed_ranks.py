"""EVA's ``rho``: ranks, alphas and values of PEFT, in the file that it reads, and kept when a run is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

import lit_lora
from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, SFTDataModule, inject_lora, save_adapter
from lit_lora.adapters import later_starts
from lit_lora.adapters.layers import lora_layers
from lit_lora.callbacks import ConvergenceAssertion, TrainingCheckpoint
from lit_lora.files.environment import CHECKPOINT_VARIABLE
from lit_lora.interchange.peft_folder import read_tensors
from tests.peft.test_later_starts import batches, logits
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]

CASES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "two": ("Llama", 2.0, {}),
    "a little": ("Llama", 1.3, {"use_rslora": True}),
    "far, some layers get none": ("Llama", 8.0, {"r": 2}),
    "patterns": ("Llama", 2.0, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*down_proj": 3}}),
    "Conv1D": ("GPT2", 2.0, {"target_modules": ["c_attn", "c_proj"]}),
}


@pytest.mark.parametrize(("kind", "rho", "more"), CASES.values(), ids=CASES)
def test_ranks_alphas_and_values_are_those_of_peft(
    kind: str, rho: float, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", IncrementalPCA._svd_fn_full)  # PEFT's estimate, made exact
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": "eva", **more}
    given = batches()
    expected = peft.LoraConfig(**settings, eva_config=peft.EvaConfig(rho=rho, tau=0.999), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(language_model(kind), expected)
    peft.initialize_lora_eva_weights(theirs, given, show_progress_bar=False)
    ours = language_model(kind)
    before = logits(ours, given[0]["input_ids"])
    report = inject_lora(ours, LoRAConfig(**settings, eva_rho=rho), start_from=given)
    others = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    layers = dict(lora_layers(ours))
    assert {name: layer.r for name, layer in layers.items()} == {n: m.r["default"] for n, m in others.items()}
    assert len({layer.r for layer in layers.values()}) > 1, "nothing was redistributed"
    assert (len(layers) < 10) == (rho == 8 or kind == "GPT2"), "some get no rank"
    assert report.adapted == {name: layer.r for name, layer in layers.items()}
    for name, layer in layers.items():
        assert layer.scaling == pytest.approx(others[name].scaling["default"])
        torch.testing.assert_close(
            layer.factors()[0].detach(), others[name].lora_A["default"].weight.detach(), atol=4e-3, rtol=4e-3
        )
    torch.testing.assert_close(logits(ours, given[0]["input_ids"]), before, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        for layer in layers.values():
            layer.factors()[1].normal_()
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, written = (json.loads((tmp_path / of / "adapter_config.json").read_text()) for of in ("ours", "theirs"))
    for field in ("r", "lora_alpha", "rank_pattern"):
        assert mine[field] == written[field]
    assert mine["alpha_pattern"] == pytest.approx(written["alpha_pattern"])
    read = peft.PeftModel.from_pretrained(language_model(kind), str(tmp_path / "ours"))
    torch.testing.assert_close(
        logits(read, given[0]["input_ids"]), logits(ours, given[0]["input_ids"]), atol=1e-3, rtol=1e-3
    )


def test_ranks_are_the_same_where_memory_lets_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for held in (later_starts.HELD_BYTES, 1):
        monkeypatch.setattr(later_starts, "HELD_BYTES", held)
        config = LoRAConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights="eva", eva_rho=2.0)
        found.append(inject_lora(language_model(), config, start_from=batches(3)).adapted)
    assert found[0] == found[1]
    assert sum(found[0].values()) == 16


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_a_run_keeps_its_ranks_when_it_is_resumed_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model("Llama", vocab_size=320, hidden_size=64).save_pretrained(tmp_path / "base")
    rows = "".join(f'{{"prompt": "say {n}", "completion": "{"yes and " * n}"}}\n' for n in range(1, 9))
    (tmp_path / "rows.jsonl").write_text(rows)

    def fit(resume: str | None = None, **lora: Any) -> Any:
        data = SFTDataModule(
            str(tmp_path / "rows.jsonl"), tokenizer="bytes", batch_size=2, cache_dir=tmp_path / "cache"
        )
        config = LoRAConfig(**{"r": 2, "init_lora_weights": "eva", "eva_rho": 3.0, **lora})
        made = LoRALightningModule(
            str(tmp_path / "base"), lora=config, optimization=OptimizationConfig(learning_rate=1e-3)
        )
        outcome = lit_lora.fit(
            made, data, tmp_path / "run", resume=resume, quiet=True, report=False, max_steps=4, accelerator="cpu",
            callbacks=[TrainingCheckpoint(every_n_steps=2), ConvergenceAssertion(-9.0)],
        )  # fmt: skip
        assert outcome is not None
        assert outcome.result == "proved", outcome
        return made, read_tensors(tmp_path / "run" / "adapter" / "adapter_model.safetensors")

    def by_lightning(verb: str, checkpoint: str) -> Any:
        made = LoRALightningModule(str(tmp_path / "base"), lora=LoRAConfig(r=2, init_lora_weights="eva", eva_rho=3.0))
        rows = str(tmp_path / "rows.jsonl")
        held_out = {"validation": rows} if verb == "validate" else {}
        data = SFTDataModule(rows, **held_out, tokenizer="bytes", batch_size=2, cache_dir=tmp_path / "cache")
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            default_root_dir=tmp_path / "run", max_steps=4,
        )  # fmt: skip
        getattr(trainer, verb)(made, datamodule=data, ckpt_path=checkpoint)
        return {name: layer.r for name, layer in lora_layers(made.model)}

    trained, first = fit()
    ranks = {name: layer.r for name, layer in lora_layers(trained.model)}
    assert len(set(ranks.values())) > 1
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step=00000002.ckpt")
    again, second = fit(checkpoint)
    assert ranks == {name: layer.r for name, layer in lora_layers(again.model)}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    loaded = LoRALightningModule.load_from_checkpoint(checkpoint)
    assert ranks == {name: layer.r for name, layer in lora_layers(loaded.model)}
    with pytest.raises(ValueError, match="rank_pattern"):  # Lightning does not say which checkpoint it is going to load
        by_lightning("validate", checkpoint)
    monkeypatch.setenv(CHECKPOINT_VARIABLE, checkpoint)  # as all verbs do
    assert ranks == by_lightning("validate", checkpoint)
    monkeypatch.delenv(CHECKPOINT_VARIABLE)
    assert ranks == by_lightning("fit", checkpoint), "chosen again from the same batches"
    with pytest.raises(ValueError, match=r"model.lora.r was 2, is 4"):
        fit(checkpoint, r=4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eva_rho": 0.5, "init_lora_weights": "eva"}, "eva_rho must be a number from 1 on, got 0.5"),
        ({"eva_rho": 2.0}, "eva_rho has no effect with init_lora_weights True"),
    ],
)
def test_a_rho_without_meaning_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LoRAConfig(**settings)


def test_too_few_tokens_for_so_many_components_are_named_and_leave_the_model_as_it_was() -> None:
    model = language_model()
    config = LoRAConfig(r=8, target_modules=["q_proj"], init_lora_weights="eva", eva_rho=2.0)
    with pytest.raises(ValueError, match=r"q_proj: rank 16 needs more than 16 tokens that are learned, got 5"):
        inject_lora(model, config, start_from=batches(1, 1, 12))
    assert not list(lora_layers(model))
