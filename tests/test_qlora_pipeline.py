"""QLoRA on the real SmolLM2-135M-Instruct, end to end: every step of a user's way, and PEFT's 4-bit base."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_lora import (
    LoRAConfig,
    QuantizationConfig,
    TrainingMetrics,
    inject_lora,
    load_adapter,
    load_base_model,
    save_adapter,
)
from lit_lora.adapters.layers import lora_layers
from lit_lora.base.load import resolve_base
from tests.command_line import lit_lora

pytestmark = pytest.mark.real_model

IDS = torch.tensor([[1, 4093, 198, 3725, 260, 2251, 597, 6042, 30, 2]])


def _lit_lora(*arguments: object) -> str:
    process = lit_lora(*arguments)
    assert "gemm_4bit_forward" not in process.stderr
    return process.stdout


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_train_checkpoint_resume_generate_merge_and_load_with_transformers(real_model, tmp_path):
    run = tmp_path / "run"
    options = [
        "fit", "--config", "tiers/1_quick.yaml", "--model.quantization.embedding_bits", "null",
        "--trainer.default_root_dir", run, "--trainer.enable_progress_bar", "false", "--data.limit", 40,
        "--data.validation_fraction", 0.1, "--checkpoint.every_n_steps", 5,
        "--model.optimization.learning_rate", 2e-3, "--model.optimization.lr_schedule", "constant",
    ]  # fmt: skip
    _lit_lora(*options, "--trainer.max_steps", 5)
    first = TrainingMetrics.load(run / "metrics.jsonl")
    _lit_lora(*options, "--trainer.max_steps", 9, "--ckpt_path", "last")
    metrics = TrainingMetrics.load(run / "metrics.jsonl")
    assert [step.step for step in metrics.steps] == list(range(1, 10))
    assert metrics.losses[:5] == first.losses
    assert metrics.losses[-1] < 0.6 * metrics.losses[0]
    assert metrics.validation[-1]["val_loss"] < 0.6 * metrics.validation[0]["val_loss"]

    prompt, generating = "put dentist appointment in my calendar on Friday", ["--max_new_tokens", 24, "--compare"]
    system = ["--system", "Turn the request into JSON."]
    answers = _lit_lora(
        "generate", prompt, "--adapter", run / "adapter", *system, *generating, "--quantization.bits", 4
    ).partition("--- with the adapter")
    assert answers[2].strip()
    assert answers[2].strip() not in answers[0]

    merged = tmp_path / "merged"
    printed = _lit_lora("merge", run / "adapter", merged, "--into", "dequantized", "--num_samples", 4)
    assert "as trained" in printed
    trained = load_base_model(real_model, quantization=QuantizationConfig())
    load_adapter(trained, run / "adapter")
    expected = _logits(trained)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    # float32: merging only changes the order of the sums.
    assert (_logits(plain) - expected).abs().max() < 1e-3
    assert AutoTokenizer.from_pretrained(merged).chat_template
    del trained, plain

    printed = _lit_lora("merge", run / "adapter", tmp_path / "full", "--into", "base", "--num_samples", 4)
    assert "on the same base" in printed
    unmerged = load_base_model(real_model)
    load_adapter(unmerged, run / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert (_logits(plain) - _logits(unmerged)).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_and_pefts_own_4_bit_base_go_both_ways(real_model, tmp_path):
    location = resolve_base(real_model)[0]

    def peft_base() -> torch.nn.Module:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, quantization_config=config)
        for module in model.modules():  # else an eval forward computes in bfloat16 on CPUs with AVX512-BF16
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    ours = load_base_model(real_model, quantization=QuantizationConfig())
    base_logits = _logits(ours)
    torch.manual_seed(0)
    inject_lora(ours, LoRAConfig(r=4, init_lora_weights=False))
    for _, layer in lora_layers(ours):
        layer.factors()[1].data.mul_(0.02)
    save_adapter(ours, tmp_path / "ours")
    expected = _logits(ours)
    scale = expected.abs().max()
    assert (expected - base_logits).abs().max() > 1e-2 * scale
    theirs = peft.PeftModel.from_pretrained(peft_base(), tmp_path / "ours")
    assert (_logits(theirs) - expected).abs().max() < 1e-4 * scale
    del ours, theirs

    theirs = peft.get_peft_model(
        peft_base(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.02)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = _logits(theirs)
    ours = load_base_model(real_model, quantization=QuantizationConfig())
    load_adapter(ours, tmp_path / "theirs")
    assert (_logits(ours) - expected).abs().max() < 1e-4 * scale


def test_dequantizing_is_a_small_part_of_a_training_step(real_model):
    """Twice all 210 layers, in both kinds of code, against about 900 tokens on one thread."""
    import time

    from lit_lora.base import base_weight

    model = load_base_model(real_model, quantization=QuantizationConfig())
    layers = [module for module in model.modules() if base_weight.is_quantized(module)]
    assert len(layers) == 210
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = {}
        for name, read in {
            "read_weight": base_weight.read_weight,
            "look_up_4bit": lambda layer: base_weight.look_up_4bit(layer.weight.data, layer.weight.quant_state),
        }.items():
            times = []
            for _ in range(3):
                started = time.perf_counter()
                for layer in layers:
                    read(layer)
                times.append(2 * (time.perf_counter() - started))
            seconds[name] = min(times)
        ids = torch.randint(100, 40000, (1, 900))
        started = time.perf_counter()
        inject_lora(model, LoRAConfig(r=8))
        model.train()(input_ids=ids, labels=ids).loss.backward()
        step = time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
    print(f"\ndequantizing 2 x 210 layers: {seconds}; step of 900 tokens: {step:.2f} s")
    assert max(seconds.values()) < 0.1 * step
