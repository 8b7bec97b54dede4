"""Fine-tuning the real SmolLM2-135M-Instruct on the quickstart's data by the command line, and its adapter in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lit_lora import (
    LoRAConfig,
    TrainingMetrics,
    assert_loss_convergence,
    inject_lora,
    load_adapter,
    load_base_model,
    load_tokenizer,
    save_adapter,
)
from lit_lora.base.load import resolve_base
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source
from lit_lora.language_model.forward import language_model_loss
from lit_lora.language_model.trial import choose_path
from tests.command_line import lit_lora

pytestmark = pytest.mark.real_model

CONFIGS = {
    "lora_minimal": ["q_proj"],
    "lora_standard": ["q_proj", "v_proj"],
    "lora_full_attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "lora_mlp": ["gate_proj", "up_proj", "down_proj"],
}


def _fit(config: str, requests: Path, folder: Path, *overrides: object) -> tuple[TrainingMetrics, dict[str, dict]]:
    process = lit_lora(
        "fit", "--config", f"{config}.yaml", "--data.train", requests, "--data.validation_fraction", 0.1,
        "--data.batch_size", 2, "--trainer.default_root_dir", folder, "--trainer.enable_progress_bar", "false",
        *overrides,
    )  # fmt: skip
    assert "adapter" in process.stdout
    verdicts = {entry["name"]: entry for entry in json.loads((folder / "verdict.json").read_text())["verdicts"]}
    return TrainingMetrics.load(folder / "metrics.jsonl"), verdicts


@pytest.mark.parametrize("config", CONFIGS)
def test_each_config_learns_and_proves_its_gradient_flow(config, real_model, requests, tmp_path):
    metrics, verdicts = _fit(
        config, requests, tmp_path / "run", "--data.limit", 60, "--trainer.max_steps", 10, "--convergence.window", 3,
        "--convergence.min_decrease", 0.05,
    )  # fmt: skip
    assert verdicts["gradient flow"]["passed"], verdicts
    first, last = metrics.validation[0]["val_loss"], metrics.validation[-1]["val_loss"]
    assert last < first, f"validation loss {first} -> {last}"
    assert sum(metrics.losses[-3:]) < sum(metrics.losses[:3])
    assert all(0 < step.grad_norm < 100 for step in metrics.steps)
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == sorted(CONFIGS[config])


def test_a_hundred_steps_lower_the_loss_by_thirty_percent(real_model, requests, tmp_path):
    """Mean of 5 steps at each end; learning rate 1e-3, cosine."""
    metrics, verdicts = _fit(
        "lora_full_attention", requests, tmp_path / "run", "--data.limit", 240, "--trainer.max_steps", 100,
        "--data.max_length", 192, "--model.lora.target_modules", "all-linear", "--convergence.window", 5,
        "--convergence.min_decrease", 0.3, "--convergence.on_failure", "raise",
    )  # fmt: skip
    assert_loss_convergence(metrics.losses, min_decrease=0.3, window=5)
    assert verdicts["convergence"]["passed"]
    assert verdicts["gradient flow"]["passed"]


def test_a_resumed_run_goes_on_falling_from_where_it_was(real_model, requests, tmp_path):
    options = (
        "--data.limit",
        40,
        "--checkpoint.every_n_steps",
        5,
        "--data.max_length",
        160,
        "--convergence.min_decrease",
        -1,
    )
    first, _ = _fit("lora_standard", requests, tmp_path / "run", *options, "--trainer.max_steps", 5)
    both, verdicts = _fit(
        "lora_standard", requests, tmp_path / "run", *options, "--trainer.max_steps", 10, "--ckpt_path", "last"
    )
    assert [step.step for step in both.steps] == list(range(1, 11))
    assert both.losses[:5] == first.losses
    assert both.validation[-1]["val_loss"] < first.validation[-1]["val_loss"] < first.validation[0]["val_loss"]
    assert verdicts["gradient flow"]["passed"]


def test_rank_scales_parameters_and_adapter_size(real_model, tmp_path):
    model = load_base_model(real_model)
    counts, sizes = [], []
    for r in (4, 8, 16, 32):
        adapted = load_base_model(real_model) if counts else model
        report = inject_lora(adapted, LoRAConfig(r=r, target_modules=["q_proj", "v_proj"]))
        counts.append(report.num_trainable)
        save_adapter(adapted, tmp_path / str(r), base_model_name=real_model)
        sizes.append((tmp_path / str(r) / "adapter_model.safetensors").stat().st_size)
    assert [count // counts[0] for count in counts] == [1, 2, 4, 8]
    assert [round(size / sizes[0], 1) for size in sizes] == pytest.approx([1, 2, 4, 8], rel=0.03)


@pytest.fixture(scope="module")
def trained(real_model, tmp_path_factory):
    """An adapter with A and B away from their start, on all projections."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapter")
    model = load_base_model(real_model)
    inject_lora(model, LoRAConfig(r=8, lora_alpha=16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    save_adapter(model, folder, base_model_name=real_model)
    return model, folder


def _plain(real_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve_base(real_model)[0], dtype=torch.float32)


@pytest.fixture(scope="module")
def token_ids(real_model):
    return load_tokenizer(real_model)("What is 17 times 3? Explain step by step.", return_tensors="pt").input_ids


def test_peft_loads_the_adapter_with_equal_logits_and_gradients(trained, real_model, requests, tmp_path):
    from peft import PeftModel

    ours, folder = trained
    theirs = PeftModel.from_pretrained(_plain(real_model), folder, is_trainable=True)
    data = tokenize_source(str(requests), load_tokenizer(real_model), SourceSettings(limit=3), cache_dir=tmp_path)
    examples = [data[index] for index in range(3)]
    batch = collate_packed(examples)
    loss = language_model_loss(ours, batch, choose_path(ours)).nll_sum / batch["target_ids"].numel()
    ours.zero_grad()
    loss.backward()
    nll_sum, num_targets = 0.0, 0
    for example in examples:
        ids = torch.tensor(example.ids, dtype=torch.long)[None]
        labels = torch.where(torch.tensor(example.mask), ids[0], -100)
        logits = theirs(input_ids=ids).logits[0]
        ours_logits = ours(input_ids=ids).logits[0]
        assert (logits - ours_logits).abs().max() < 1e-5 * logits.abs().max()
        nll_sum = nll_sum + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        num_targets += int((labels[1:] != -100).sum())
    (nll_sum / num_targets).backward()
    assert loss.item() == pytest.approx((nll_sum / num_targets).item(), rel=1e-5)
    gradients = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    adapters = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert adapters.keys() == gradients.keys()
    assert len(adapters) == 420
    for name, gradient in adapters.items():
        assert (gradient - gradients[name]).abs().max() < 2e-5, name


def test_transformers_load_adapter_gives_equal_logits(trained, real_model, token_ids):
    ours, folder = trained
    theirs = _plain(real_model)
    theirs.load_adapter(str(folder))
    with torch.no_grad():
        expected, got = ours.eval()(input_ids=token_ids).logits, theirs.eval()(input_ids=token_ids).logits
    assert (expected - got).abs().max() < 1e-5 * expected.abs().max()


def test_own_loader_gives_equal_logits(trained, real_model, token_ids):
    ours, folder = trained
    fresh = load_base_model(real_model)
    load_adapter(fresh, folder)
    with torch.no_grad():
        assert torch.equal(ours.eval()(input_ids=token_ids).logits, fresh.eval()(input_ids=token_ids).logits)


def test_generate_streams_an_answer_with_and_without_the_adapter(trained, real_model):
    _, folder = trained
    process = lit_lora(
        "generate", "Say hello.", "--base", real_model, "--adapter", folder, "--compare", "--max_new_tokens", 8
    )
    assert "--- without the adapter" in process.stdout
    assert len(process.stdout.split("--- with the adapter")[1].strip()) > 0


def test_predict_writes_generations(real_model, requests, tmp_path):
    lit_lora(
        "predict", "--config", "lora_minimal.yaml", "--data.train", requests, "--data.limit", 4,
        "--data.validation_fraction", 0.5, "--trainer.default_root_dir", tmp_path, "--model.max_new_tokens", 6,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(line["prompt"] and line["reference"] for line in lines)
