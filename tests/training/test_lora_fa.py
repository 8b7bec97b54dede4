"""LoRA-FA: A stays as it starts, B trains as under PEFT's optimizer, and a run resumes with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, lorafa

import lit_lora
from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, SFTDataModule, inject_lora, load_adapter
from lit_lora.adapters.fixed_half import fixed_halves, untrained_tensors
from lit_lora.adapters.layers import lora_layers
from lit_lora.callbacks import ConvergenceAssertion, TrainingCheckpoint
from lit_lora.interchange.peft_folder import read_tensors
from lit_lora.training.lora_fa import LoRAFA
from tests.tiny import language_model

IDS = torch.arange(24).view(2, 12) + 3
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rslora", [False, True])
def test_b_trains_as_under_the_optimizer_of_peft(
    rslora: bool, weight_decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # it would round the gradients
    config = {**SETTINGS, "use_rslora": rslora}
    ours = language_model()
    inject_lora(ours, LoRAConfig(**config, freeze_A=True))
    theirs = peft.get_peft_model(language_model(), peft.LoraConfig(**config))
    for name, layer in lora_layers(ours):
        theirs.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(layer.factors()[0])
    before = {name: tensor.clone() for name, tensor in untrained_tensors(ours).items()}
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    halves = fixed_halves(ours)
    assert [id(p) for p in trained] == [id(half.lora_B) for half in halves]
    assert len(before) == len(halves) == 4
    optimizer = LoRAFA([{"params": trained}], halves, lr=0.01, weight_decay=weight_decay, eps=1e-9)
    others = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=0.01, weight_decay=weight_decay)
    others.param_groups[0]["eps"] = 1e-9
    for _ in range(4):
        losses = []
        for model, stepped in ((ours, optimizer), (theirs, others)):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            stepped.step()
            stepped.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, atol=1e-3, rtol=1e-3)
    for name, layer in lora_layers(ours):
        other = theirs.base_model.model.get_submodule(name).lora_B["default"].weight
        torch.testing.assert_close(layer.factors()[1].detach(), other.detach(), atol=1e-3, rtol=1e-2)
        assert layer.factors()[1].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in untrained_tensors(ours).items())


@pytest.mark.parametrize("start", [True, "eva", "pissa"])
def test_a_run_is_proved_resumed_bit_for_bit_and_trained_on(start: Any, tmp_path: Path) -> None:
    language_model("Llama", vocab_size=320).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say one", "completion": "yes, and no"}\n' * 8)
    ids = torch.arange(12)[None] + 3

    def fit(folder: str = "run", resume: str | None = None, seed: int = 0, **options: Any) -> Any:
        data = SFTDataModule(
            str(tmp_path / "rows.jsonl"), tokenizer="bytes", batch_size=2, cache_dir=tmp_path / "cache"
        )
        made = LoRALightningModule(
            str(tmp_path / "base"), optimization=OptimizationConfig(learning_rate=1e-3), **options
        )
        outcome = lit_lora.fit(
            made, data, tmp_path / folder, resume=resume, quiet=True, report=False, max_steps=4, accelerator="cpu",
            seed=seed, callbacks=[TrainingCheckpoint(every_n_steps=2), ConvergenceAssertion(-9.0)],
        )  # fmt: skip
        assert outcome is not None
        assert outcome.result == "proved", outcome
        assert isinstance(made.trainer.optimizers[0], LoRAFA)
        return made, read_tensors(tmp_path / folder / "adapter" / "adapter_model.safetensors")

    lora = LoRAConfig(r=4, init_lora_weights=start, freeze_A=True)
    trained, first = fit(lora=lora)
    _, again = fit(resume=str(tmp_path / "run" / "checkpoints" / "step=00000002.ckpt"), seed=3, lora=lora)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    read = language_model("Llama", vocab_size=320)
    load_adapter(read, tmp_path / "run" / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, trained.model.eval()(ids).logits, atol=1e-3, rtol=1e-3)
    _, more = fit("more", adapter=str(tmp_path / "run" / "adapter"), lora=LoRAConfig(freeze_A=True))
    assert all(torch.equal(more[name], first[name]) == ("lora_A" in name) for name in first)


def test_embeddings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze_A is for linear layers, and model.embed_tokens is none"):
        inject_lora(language_model(), LoRAConfig(target_modules=["q_proj", "embed_tokens"], freeze_A=True))
