"""What is predicted is what is there: estimates against live storages of real steps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import PreTrainedConfig

from lit_lora.adapters.inject import inject_lora
from lit_lora.base.load import load_base_model
from lit_lora.build import make_trainable
from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig, parse_bytes
from lit_lora.language_model.forward import Batch, placeholder_batch
from lit_lora.memory.estimate import MemoryEstimate, estimate_memory, trace
from lit_lora.memory.storage_tracker import StorageTracker
from lit_lora.memory.suggest import suggest
from lit_lora.memory.traced_step import CATEGORIES, GATHERED, StepSettings, run_step
from lit_lora.module import LoRALightningModule
from tests.tiny import config

NF4 = QuantizationConfig()
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "vocab_size": 512}
DEEP: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8, "vocab_size": 256}
TIED: dict[str, Any] = {**WIDE, "tie_word_embeddings": True, "vocab_size": 2048}
MOE: dict[str, Any] = {"hidden_size": 64, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA: dict[str, Any] = {"state_size": 8, "hidden_size": 64}
LORA = LoRAConfig(r=4)
RECOMPUTED = StepConfig(recompute=True)
MAMBA_LORA = LoRAConfig(r=4, exclude_modules=["dt_proj", "out_proj"])  # its kernels read their weights


def saved_config(folder: Path, kind: str = "Llama", **fields: Any) -> str:
    made: PreTrainedConfig = config(kind, **fields)
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(made.to_dict() | {"architectures": [f"{kind}ForCausalLM"]}), encoding="utf-8")
    return f"random:{path}"


def batch_of(settings: StepSettings) -> Batch:
    return placeholder_batch(settings.lengths, packed=settings.packing, device="cpu")


def measure(estimate: MemoryEstimate, base: str | None = None) -> StorageTracker:
    """Run the step of an estimate on real tensors."""
    settings = estimate.settings
    model = load_base_model(base or settings.base, quantization=settings.quantization)
    step = replace(settings.step, shared_prefix=False)
    path = make_trainable(model, settings.lora, step, packing=settings.packing).path
    assert path is not None
    tracker = StorageTracker(model)
    with tracker:
        tracker.add([*model.parameters(), *model.buffers()])
        batch = placeholder_batch(settings.lengths, packed=path.packed, device="cpu")
        run_step(model, batch, path, tracker, keeps_gradients=settings.accumulate_grad_batches > 1)
    return tracker


@pytest.mark.parametrize(
    ("kind", "shape", "settings"),
    [
        pytest.param("Llama", WIDE, {}, id="wide"),
        pytest.param("Llama", DEEP, {"lengths": (90, 7, 33)}, id="deep, ragged"),
        pytest.param("Qwen2", TIED, {}, id="tied, biases"),
        pytest.param("Llama", DEEP, {"step": RECOMPUTED}, id="checkpointed"),
        pytest.param("Llama", DEEP, {"step": StepConfig(recompute=3)}, id="three layers checkpointed"),
        pytest.param("Llama", WIDE, {"quantization": NF4}, id="NF4, double quantization"),
        pytest.param("Llama", DEEP, {"quantization": QuantizationConfig(double_quant=False)}, id="NF4"),
        pytest.param("Llama", TIED, {"quantization": QuantizationConfig(embedding_bits=8)}, id="8-bit embedding"),
        pytest.param("Llama", DEEP, {"quantization": NF4, "step": RECOMPUTED}, id="NF4, checkpointed"),
        pytest.param("Llama", WIDE, {"packing": False, "lengths": (50, 50)}, id="padded"),
        pytest.param("Llama", WIDE, {"accumulate_grad_batches": 4}, id="accumulated gradients"),
        pytest.param("Mixtral", MOE, {}, id="mixture of experts"),
        pytest.param("Qwen3Moe", {**MOE, "moe_intermediate_size": 96}, {}, id="another mixture of experts"),
        pytest.param("Bloom", {"hidden_size": 64}, {"lengths": (64, 40)}, id="padded by the model's nature"),
        pytest.param("Mamba", MAMBA, {"lengths": (20, 30), "lora": MAMBA_LORA}, id="no attention at all"),
        pytest.param("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, {}, id="logits of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:not adapted")
def test_estimate_is_within_5_percent_of_what_is_alive(
    tmp_path: Path, kind: str, shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    lora = LORA if shape is not WIDE else LoRAConfig(r=16, target_modules=["q_proj", "down_proj"])
    estimate = estimate_memory(
        saved_config(tmp_path, kind, **shape), **{"lengths": (64, 64), "lora": lora, "device": "cpu", **settings}
    )
    tracker = measure(estimate)
    for phase in ("forward", "backward", "optimizer"):
        assert estimate.phases[phase].total == pytest.approx(tracker.peak(phase).total, rel=0.05), phase
    assert estimate.peak.total == pytest.approx(tracker.peak().total, rel=0.05)


def test_estimate_is_within_5_percent_of_a_run_of_the_trainer(tmp_path: Path) -> None:
    base = saved_config(tmp_path, **WIDE)
    lengths = (60, 41, 83)
    module = LoRALightningModule(base, lora=LORA, quantization=NF4)
    module.configure_model()
    estimate = estimate_memory(base, lengths=lengths, lora=LORA, quantization=NF4)
    batch = batch_of(estimate.settings)
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader([batch] * 3, batch_size=None)
    tracker = StorageTracker()
    with tracker:
        trainer.fit(module, loader)
    assert estimate.peak.total == pytest.approx(tracker.peak().total, rel=0.05)


@pytest.mark.real_model
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="LoRA"),
        pytest.param({"step": RECOMPUTED}, id="LoRA, checkpointed"),
        pytest.param({"quantization": NF4}, id="QLoRA"),
        pytest.param({"quantization": NF4, "step": RECOMPUTED}, id="QLoRA, checkpointed"),
    ],
)
def test_estimate_of_a_real_model_is_within_5_percent(settings: dict[str, Any]) -> None:
    estimate = estimate_memory("smollm2-135m-instruct", lengths=(97, 133, 208), lora=LoRAConfig(r=8), **settings)
    tracker = measure(estimate)
    measured = {phase: tracker.peak(phase).total for phase in ("forward", "backward", "optimizer")}
    print({phase: (estimate.phases[phase].total / 1e6, total / 1e6) for phase, total in measured.items()})
    for phase, total in measured.items():
        assert estimate.phases[phase].total == pytest.approx(total, rel=0.05), phase


def test_categories_are_what_they_say(tmp_path: Path) -> None:
    estimate = estimate_memory(saved_config(tmp_path, **WIDE), lengths=(64, 64), lora=LORA)
    adapters = estimate.phases["optimizer"].by_category["adapters"]
    model = load_base_model(estimate.settings.base)
    base_bytes = sum(parameter.nbytes for parameter in model.parameters())
    report = inject_lora(model, LORA)
    assert adapters == 4 * report.num_trainable
    assert estimate.peak.by_category["base"] == pytest.approx(base_bytes, rel=0.01)
    optimizer = estimate.phases["optimizer"].by_category
    assert optimizer["gradients"] == adapters
    assert optimizer["optimizer"] == pytest.approx(2 * adapters, rel=0.01)
    for peak in estimate.phases.values():
        assert sum(peak.by_category.values()) == peak.total
        assert set(peak.by_category) <= set(CATEGORIES)


def test_checkpointing_quantization_and_double_quantization_each_save(tmp_path: Path) -> None:
    base = saved_config(tmp_path, **WIDE)
    lora, nf4, single, checkpointed = (
        estimate_memory(base, lengths=(64, 64), lora=LORA, **settings)
        for settings in (
            {},
            {"quantization": NF4},
            {"quantization": QuantizationConfig(double_quant=False)},
            {"step": RECOMPUTED},
        )
    )
    assert nf4.peak_bytes < single.peak_bytes < lora.peak_bytes
    assert checkpointed.peak_bytes < lora.peak_bytes
    linear = 3 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 320)
    saved = single.peak.by_category["base"] - nf4.peak.by_category["base"]
    # A float32 scale for each 64 weights becomes a byte, and a float32 scale for each 256 of those; each of 21 layers
    # also has an offset and a table of 256 codes.
    assert saved == pytest.approx(linear / 64 * (4 - 1 - 4 / 256) - 21 * (4 + 1024), abs=100)


def test_cuda_settings_are_traced_without_cuda(tmp_path: Path) -> None:
    base = saved_config(tmp_path, **WIDE)
    cpu = estimate_memory(base, lengths=(64, 64), lora=LORA, quantization=NF4)
    cuda = estimate_memory(base, lengths=(64, 64), lora=LORA, quantization=NF4, device="cuda")
    assert cuda.peak.by_category["base"] < cpu.peak.by_category["base"]  # embeddings in bfloat16
    assert cuda.peak.total <= cuda.cuda.allocated <= cuda.cuda.reserved
    assert "reserved" in str(cuda)
    assert cuda.fits(cuda.cuda.reserved)
    assert not cuda.fits(cuda.cuda.reserved - 1)
    again = estimate_memory(base, lengths=(64, 64), lora=LORA, quantization=NF4)
    assert again == cpu, "tracing for CUDA left something behind"


def test_a_step_whose_attention_needs_the_lengths_is_estimated(tmp_path):
    base = saved_config(tmp_path, **DEEP)
    assert estimate_memory(base, lengths=(70, 30), lora=LORA, device="cuda", dtype="float32").cuda.allocated > 0


@pytest.mark.parametrize("step", [StepConfig(), RECOMPUTED])
def test_a_step_that_is_recorded_is_traced_in_its_shape(tmp_path, step):
    base = saved_config(tmp_path, **WIDE)

    def allocated(lengths, **changes):
        found = estimate_memory(base, lengths=lengths, lora=LORA, device="cuda", step=replace(step, **changes))
        return found.phases["forward"].total

    if step.recompute:
        assert allocated((90, 40)) == allocated((90, 40), cuda_graphs=False)
        return
    exact, rounded = allocated((216, 40)), allocated((116, 24))
    assert exact == allocated((216, 40))
    assert rounded == allocated((130, 20)) > allocated((116, 24), cuda_graphs=False)
    assert allocated((86, 40), cuda_graphs=False) < allocated((86, 40)) < rounded < exact * 1.001


@pytest.mark.parametrize(
    ("model", "lengths", "checkpointing", "bound"),
    [
        ("smollm2-135m", (512,), True, "512MB"),
        ("tinyllama-1.1b", (512,) * 4, True, "2GB"),
        ("llama-2-7b", (512,) * 4, True, "8GB"),
        ("llama-2-7b", (512,) * 2, False, "12GB"),
    ],
)
def test_qlora_stays_within_the_bounds_that_the_readme_gives(model, lengths, checkpointing, bound) -> None:
    estimate = estimate_memory(
        f"random:{model}", lengths=lengths, lora=LoRAConfig(r=16), quantization=NF4,
        step=StepConfig(recompute=checkpointing), device="cuda",
    )  # fmt: skip
    assert estimate.fits(bound)


def test_no_memory_is_taken_by_a_trace() -> None:
    import psutil

    process = psutil.Process()
    before = process.memory_info().rss
    estimate = estimate_memory("random:tinyllama-1.1b", lengths=(64,), lora=LoRAConfig(r=8), device="cuda")
    assert estimate.peak.by_category["base"] > 2_000_000_000
    assert process.memory_info().rss - before < 500_000_000


def test_suggestions_are_traced_and_best_comes_first(tmp_path: Path) -> None:
    estimate = estimate_memory(saved_config(tmp_path), lengths=(64, 64), lora=LoRAConfig(r=16))
    found = suggest(estimate)
    peaks = [suggestion.estimate.peak_bytes for suggestion in found]
    assert peaks == sorted(peaks)
    assert {s.change for s in found} >= {"model.step.recompute true", "model.quantization.bits 4"}
    for suggestion in found:
        assert suggestion.estimate.peak_bytes < estimate.peak_bytes
    assert trace(found[0].estimate.settings) == found[0].estimate
    limit = min(peaks) - 1
    together = suggest(estimate, limit)[0]
    assert " + " in together.change
    assert together.estimate.peak_bytes < min(peaks)
    assert together.estimate.fits(limit)


@pytest.mark.parametrize(
    ("text", "expected"), [("12GB", 12 * 10**9), ("8 GiB", 2**33), ("1.5mb", 1_500_000), ("77", 77), (5, 5)]
)
def test_amounts_of_memory(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["much", "12 G B", "-1GB", "GB", ""])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="expected an amount of memory such as 12GB"):
        parse_bytes(text)


def test_examples_too_short_to_learn_from_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        estimate_memory("random:smollm2-135m", lengths=[1])


def test_text_names_peak_and_place(tmp_path: Path) -> None:
    estimate = estimate_memory(saved_config(tmp_path, **WIDE), lengths=(64,), lora=LORA)
    text = str(estimate)
    assert f"in {estimate.peak_phase} (" in text
    assert [category for category in CATEGORIES if category not in text] == [GATHERED]  # of several devices
    assert asdict(estimate)["settings"]["lengths"] == (64,)
