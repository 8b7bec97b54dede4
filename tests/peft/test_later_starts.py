"""Starts made of inputs or of what quantization took: PEFT's numbers, and runs that resume and are read by PEFT."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.corda import preprocess_corda
from peft.utils.incremental_pca import IncrementalPCA
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn

import lit_lora
from lit_lora import (
    LoRAConfig,
    LoRALightningModule,
    OptimizationConfig,
    QuantizationConfig,
    SFTDataModule,
    inject_lora,
    save_adapter,
)
from lit_lora.adapters import later_starts
from lit_lora.adapters.later_starts import OF_INPUTS
from lit_lora.adapters.layers import lora_layers
from lit_lora.base import base_weight
from lit_lora.base.quantize import quantize_
from lit_lora.callbacks import ConvergenceAssertion, TrainingCheckpoint
from lit_lora.config import LATER_STARTS
from lit_lora.interchange.peft_folder import read_tensors
from lit_lora.training.start_source import first_batches
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6}
TARGETS = {"Llama": ["q_proj", "down_proj"], "GPT2": ["c_attn", "c_proj"]}


def batches(number: int = 1, rows: int = 3, length: int = 40) -> list[dict[str, torch.Tensor]]:
    """Of which the first five tokens of a row are a prompt, and the last two of the last row padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(number):
        ids = torch.randint(3, 128, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        labels = ids.clone()
        labels[:, :5] = -100
        mask[-1, -2:], labels[-1, -2:] = 0, -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def of_peft(kind: str, start: str, given: list[dict[str, torch.Tensor]], **more: Any) -> Any:
    settings = {**SETTINGS, "target_modules": TARGETS[kind], "task_type": "CAUSAL_LM"}
    model = language_model(kind)
    if start == "eva":  # the same batch again and again, until nothing moves
        config = peft.LoraConfig(**settings, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.999))
        adapted = peft.get_peft_model(model, config)
        peft.initialize_lora_eva_weights(adapted, given, show_progress_bar=False)
        return adapted.base_model.model
    corda = peft.tuners.lora.config.CordaConfig(corda_method="ipm")
    config = peft.LoraConfig(**settings, init_lora_weights="corda", corda_config=corda)
    preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in given])
    return peft.get_peft_model(model, config).base_model.model


def test_every_such_start_has_a_row() -> None:
    assert {*OF_INPUTS, "loftq"} == set(LATER_STARTS)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("start", "tolerance"), [("eva", 2e-3), ("corda", 1e-3)])
def test_a_and_b_start_as_in_peft_from_the_same_batch(
    start: Any, tolerance: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IncrementalPCA, "_svd_fn_lowrank", IncrementalPCA._svd_fn_full)  # PEFT's estimate, made exact
    given = batches() if start == "eva" else [{"input_ids": batches()[0]["input_ids"][:1]}]
    ours, ids = language_model(kind), given[0]["input_ids"]
    expected = logits(ours, ids)
    inject_lora(ours, LoRAConfig(**SETTINGS, target_modules=TARGETS[kind], init_lora_weights=start), start_from=given)
    theirs = of_peft(kind, start, given)
    for name, layer in lora_layers(ours):
        other = theirs.get_submodule(name)
        for half, got in zip(("lora_A", "lora_B"), layer.factors(), strict=True):
            wanted = getattr(other, half)["default"].weight.detach()
            if start == "corda":  # the sign of a singular vector is anyone's
                dim = 1 if half == "lora_A" else 0
                wanted = wanted * (wanted * got.detach()).sum(dim, keepdim=True).sign()
            torch.testing.assert_close(got.detach(), wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logits(ours, ids), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits(theirs, ids), expected, atol=1e-3, rtol=1e-3)


def test_eva_is_the_principal_components_of_all_learned_tokens_of_several_batches(monkeypatch: Any) -> None:
    monkeypatch.setattr(later_starts, "HELD_BYTES", 1)  # one layer after another
    model, given, seen = language_model(), batches(3), []
    name = "model.layers.1.mlp.down_proj"

    def note(_: nn.Module, args: tuple[torch.Tensor]) -> None:
        seen.append(args[0][given[len(seen)]["labels"] != -100])

    handle = model.get_submodule(name).register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in given:
            model(**batch)
    handle.remove()
    rows = torch.cat(seen).double()
    _, _, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    inject_lora(model, LoRAConfig(**SETTINGS, init_lora_weights="eva"), start_from=given)
    A = dict(lora_layers(model))[name].factors()[0].double()
    torch.testing.assert_close((A @ Vh[:4].T).abs(), torch.eye(4, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    assert all(len(layer.base_layer._forward_pre_hooks) == 0 for _, layer in lora_layers(model))


@pytest.mark.parametrize("start", OF_INPUTS)
def test_layers_that_share_an_input_start_as_each_for_itself(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for held in (later_starts.HELD_BYTES, 1):
        monkeypatch.setattr(later_starts, "HELD_BYTES", held)
        model = language_model()
        inject_lora(model, LoRAConfig(**SETTINGS, init_lora_weights=start), start_from=batches(3))
        found.append({name: [half.detach() for half in layer.factors()] for name, layer in lora_layers(model)})
    together, alone = found
    assert len(together) == 14
    for name, halves in together.items():
        for got, wanted in zip(halves, alone[name], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    q, k = (together[f"model.layers.0.self_attn.{kind}_proj"][0] for kind in "qk")
    assert torch.equal(q, k) == (start == "eva")


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("dora", [False, True])
def test_loftq_brings_the_quantized_weight_nearer_to_the_one_before(scale: int, dora: bool) -> None:
    original, model = language_model(), language_model()
    quantize_(model, QuantizationConfig(block_size=32))
    config = LoRAConfig(
        r=8, lora_alpha=8 * scale, target_modules=["q_proj", "down_proj"], init_lora_weights="loftq", use_dora=dora
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    inject_lora(model, config, start_from=lambda name: original.get_submodule(name).weight)
    for name, layer in lora_layers(model):
        wanted = original.get_submodule(name).weight
        lost = wanted - layer.read_base()
        of_peft = _low_rank_decomposition(lost, reduced_rank=8)  # what replace_lora_weights_loftq takes, on CUDA alone
        A, B = layer.factors()
        torch.testing.assert_close(layer.scaling * B @ A, of_peft["L"] @ of_peft["R"], atol=1e-5, rtol=1e-4)
        if scale == 1:
            torch.testing.assert_close(A.abs(), of_peft["R"].abs(), atol=1e-5, rtol=1e-4)
        if not dora:
            assert (layer.merged_weight() - wanted).norm() < 0.9 * lost.norm()
        assert torch.equal(layer.base_layer.weight, before[f"{name}.weight"])


@pytest.mark.parametrize(
    ("settings", "start_from", "named"),
    [
        ({"init_lora_weights": "eva"}, None, "'eva' is made of batches of the training data"),
        ({"init_lora_weights": "eva"}, lambda name: torch.ones(1), "'eva' is made of batches of the training data"),
        ({"init_lora_weights": "loftq"}, None, "'loftq' is made of the weights before quantization"),
        ({"init_lora_weights": "loftq"}, lambda name: torch.ones(1), "no adapted layer is quantized"),
        ({"init_lora_weights": "pissa"}, batches(), "start_from has no effect with init_lora_weights 'pissa'"),
        (
            {"init_lora_weights": "eva", "r": 16},
            batches(1, 1, 12),
            "q_proj: rank 16 needs more than 16 tokens .* got 5",
        ),
        ({"init_lora_weights": "corda", "use_dora": True}, batches(), "use_dora does not work with"),
        ({"init_lora_weights": "eva", "target_modules": ["embed_tokens"]}, batches(), "is for linear layers"),
        ({"init_lora_weights": "corda", "r": 40}, batches(), "has 32, r is 40"),
    ],
)
def test_what_cannot_start_so_is_refused(settings: dict[str, Any], start_from: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        inject_lora(language_model(), LoRAConfig(**{"target_modules": ["q_proj"], **settings}), start_from=start_from)


def module(base: Path, start: Any, **more: Any) -> LoRALightningModule:
    quantization = QuantizationConfig() if start == "loftq" else None
    return LoRALightningModule(
        str(base), lora=LoRAConfig(r=4, init_lora_weights=start), quantization=quantization,
        optimization=OptimizationConfig(learning_rate=1e-3), **more,
    )  # fmt: skip


@pytest.mark.parametrize("start", LATER_STARTS)
def test_a_run_is_proved_resumed_bit_for_bit_and_read_by_peft(start: Any, tmp_path: Path) -> None:
    language_model("Llama", vocab_size=320, hidden_size=64).save_pretrained(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say one", "completion": "yes, and no"}\n' * 8)

    def fit(resume: str | None = None) -> Any:
        data = SFTDataModule(
            str(tmp_path / "rows.jsonl"), tokenizer="bytes", batch_size=2, cache_dir=tmp_path / "cache"
        )
        outcome = lit_lora.fit(
            made := module(tmp_path / "base", start), data, tmp_path / "run", resume=resume, quiet=True, report=False,
            max_steps=4, accelerator="cpu", callbacks=[TrainingCheckpoint(every_n_steps=2), ConvergenceAssertion(-9.0)],
        )  # fmt: skip
        assert outcome is not None
        assert outcome.result == "proved", outcome
        return made, data, read_tensors(tmp_path / "run" / "adapter" / "adapter_model.safetensors")

    trained, data, first = fit()
    _, _, again = fit(str(tmp_path / "run" / "checkpoints" / "step=00000002.ckpt"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    ids = first_batches(data, 1)[0]["input_ids"]
    loaded = LoRALightningModule.load_from_checkpoint(tmp_path / "run" / "checkpoints" / "step=00000004.ckpt")
    torch.testing.assert_close(logits(loaded.model, ids), logits(trained.model, ids), atol=1e-4, rtol=1e-4)
    if start != "loftq":  # PEFT takes bitsandbytes' layers on CUDA alone
        by_peft = peft.PeftModel.from_pretrained(
            language_model("Llama", vocab_size=320, hidden_size=64), str(tmp_path / "run" / "adapter")
        )
        torch.testing.assert_close(logits(by_peft, ids), logits(trained.model, ids), atol=1e-3, rtol=1e-3)


def test_first_batches_are_those_of_training_and_draw_nothing(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "say {n}", "completion": "{"yes" * n}"}}\n' for n in range(1, 8))
    )
    data = SFTDataModule(
        str(tmp_path / "rows.jsonl"), tokenizer="bytes", batch_size=2, cache_dir=tmp_path / "cache", packing=False
    )
    data.setup("fit")
    state = torch.get_rng_state()
    first = first_batches(data, 3)
    assert torch.equal(torch.get_rng_state(), state)
    for got, batch in zip(first, data.train_dataloader(), strict=False):
        assert torch.equal(got["input_ids"], batch["input_ids"])
        assert torch.equal(got["labels"][got["labels"] != -100], batch["target_ids"])
    assert len(first) == 3
    assert not torch.equal(first[0]["input_ids"], first[1]["input_ids"])


@pytest.mark.parametrize(
    ("start", "named"), [("loftq", "the base is not quantized: set"), ("eva", "takes batches of an SFTDataModule")]
)
def test_a_run_without_what_it_starts_from_is_refused(start: Any, named: str, tmp_path: Path) -> None:
    language_model("Llama", vocab_size=320).save_pretrained(tmp_path / "base")
    trainer = partial(
        lit_lora.module.L.Trainer, accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )()  # fmt: skip
    with pytest.raises(ValueError, match=named):
        trainer.fit(LoRALightningModule(str(tmp_path / "base"), lora=LoRAConfig(init_lora_weights=start)), batches())


def test_a_written_start_of_the_weight_fits_the_base_as_it_was(tmp_path: Path) -> None:
    model, given = language_model(), batches(2)
    inject_lora(model, LoRAConfig(**SETTINGS, init_lora_weights="corda"), start_from=given)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.factors()[1].mul_(1.1)
    save_adapter(model, tmp_path)
    by_peft = peft.PeftModel.from_pretrained(language_model(), str(tmp_path))
    ids = given[0]["input_ids"]
    torch.testing.assert_close(logits(by_peft, ids), logits(model, ids), atol=1e-3, rtol=1e-3)
    assert not base_weight.is_quantized(model)
