"""Speed on a device: lit_lora against PEFT with transformers' Trainer, and the share of what matrix products allow.

The runners are those of ``frameworks.py``: same tokens in the same order, same base weights (drawn from one seed), same
initial adapter from one file, same optimizer, clipping and batch. Each side runs at its defaults (base in the type of
its checkpoint, which is bfloat16 on CUDA; nothing recomputed) and tuned:

- PEFT without cuDNN's attention, which torch prefers on some devices and plans anew for every padded shape; with bf16
  autocast, no check of losses for NaN, FlashAttention over packed rows where flash-attn is installed and Liger's
  kernels; and all that with torch.compile.
- lit_lora with bf16 autocast (``lit_lora_bf16``), with Liger's kernels, with both, with compiled layers, and without
  CUDA graphs. A new shape of batch is recorded when it comes, in timed steps too.

A compiler that is still at work after the warm-up steps shows as a mean far below what ``median_step_s`` would give.
One more step, which is not timed, runs under torch's profiler: its kernels (``launches``), copies, waits and the
device's time (``gpu_ms``) tell whether host or device is the limit.

The share of the limit is the rate of the work that no exact step can do without (:func:`step_flops`), over the rate of
a large matrix product in the same type, measured in the same run. Left out: TRL (``benchmarks.peers.train`` has it on a
CPU), PEFT on a quantized base, more than one device.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.data import Example, config_of
from benchmarks.cuda.worker import Row
from benchmarks.peers import frameworks
from benchmarks.peers import job as jobs
from benchmarks.peers.step_clock import StepClock
from lit_lora import LoRAConfig, inject_lora, load_base_model, save_adapter

R, LORA_ALPHA = 8, 16
"""Of ``frameworks.lit_lora``."""
PARITY_BOUND = 1e-5
RATIO_BARS = {"smollm2-135m": 3.0, "tinyllama-1.1b": 2.0, "llama-2-7b": 1.5}
"""Model -> how many times PEFT + Trainer at its defaults lit_lora should be."""
QLORA_BAR = 0.9
"""Share of LoRA's speed that QLoRA should keep at 8k tokens a step."""
FRAMEWORKS = [
    "lit_lora", "peft", "peft_without_cudnn", "peft_liger", "no_cuda_graphs", "lit_lora_bf16", "liger", "liger_bf16",
    "compiled", "peft_tuned",
]  # fmt: skip
"""In the order of a round: what a budget that ends must not lose comes first."""
NEED_CUDA = {"no_cuda_graphs", "liger", "liger_bf16", "peft_without_cudnn", "peft_liger", "peft_tuned"}
COMPILING = {"compiled", "peft_tuned"}


def job_of(base: str, folder: Path, workload: str, **fields: Any) -> Row:
    """What all frameworks share; ``frameworks.py`` says what the fields are."""
    on_cuda = fields["device"] == "cuda"
    return {
        "base": base, "tokenizer": "bytes", "examples": str(folder / f"{workload}.json"),
        "adapter": str(folder / "adapter"), "learning_rate": 2e-4, "quantized": False,
        "dtype": "bfloat16" if on_cuda else "float32", **fields,
    }  # fmt: skip


def initial_adapter(settings: Row) -> Row:
    """Write the adapter that every framework starts from; for parity B is random too, or A would have no gradient."""
    torch.manual_seed(0)
    model = load_base_model(settings["base"], device=settings["device"])
    inject_lora(model, LoRAConfig(r=R, lora_alpha=LORA_ALPHA, init_lora_weights=not settings.get("random_B", False)))
    save_adapter(model, settings["adapter"], base_model_name=settings["base"])
    return {}


def products(settings: Row) -> Row:
    """The rate of a large square matrix product, in the type that training computes in."""
    on_cuda = settings["device"] == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_cuda else (512, torch.float32)
    left, right = (torch.randn(size, size, device=settings["device"], dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    seconds = []
    for _ in range(13):
        start_s = time.perf_counter()
        torch.mm(left, right, out=out)
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    rate = 2 * size**3 / statistics.median(seconds[3:]) / 1e12
    return {"tflops": rate, "detail": f"{size} x {size} x {size}, {str(dtype).removeprefix('torch.')}"}


def profiler(settings: Row) -> Row:
    """Whether torch's profiler works on the device, and sees a product; where it crashes no other measurement does."""
    clock = StepClock(on_cuda=settings["device"] == "cuda", last=1, profile=True)
    left = torch.ones(64, 64, device=settings["device"])
    clock.end()
    left @ left
    clock.end()
    return {"launches": clock.profiled["launches"]}


def framework(settings: Row) -> Row:
    """Run one framework, or the parity gate, on a job."""
    job = settings["job"]
    job["threads"] = torch.get_num_threads()
    jobs.STARTED_S = time.time()  # imports were made ahead
    result = frameworks.FRAMEWORKS[settings["framework"]](job)
    if settings["framework"] == "parity":
        difference = result["gradient_difference"]
        passed = difference < PARITY_BOUND
        return {
            "status": "passed" if passed else "failed",
            "found": f"{difference:.2e}",
            "bound": f"{PARITY_BOUND:.2e}",
            "detail": f"largest difference of a gradient to PEFT's; the largest is {result['largest_gradient']:.2f}",
        }
    times_s = result.pop("step_times_s")
    seconds = sum(times_s)
    flops = sum(step_flops(job, batch) for batch in _counted_batches(job))
    return {
        **result,
        "tokens_per_s": result["num_tokens"] / seconds,
        "target_tokens_per_s": result["num_target_tokens"] / seconds,
        "median_step_s": statistics.median(times_s),
        "num_steps": len(times_s),
        "tflops": flops / seconds / 1e12,
    }


def step_flops(job: Row, batch: list[Example]) -> int:
    """What an exact step has to multiply and add, nothing recomputed.

    ``4 P_lin + 6 P_lora`` a token (a frozen weight has a forward product and one for the input's gradient), ``4 V d`` a
    supervised token, ``7 L d S`` a token for causal attention over S tokens (2 forward, 5 backward).
    """
    config: Any = config_of(job["base"])
    hidden, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, wide), (hidden, wide), (wide, hidden)]
    linear = layers * sum(a * b for a, b in shapes)
    lora = layers * R * sum(a + b for a, b in shapes)
    tokens = sum(len(ids) for ids, _ in batch)
    supervised = sum(sum(mask) for _, mask in batch)
    attended = sum(len(ids) ** 2 for ids, _ in batch)
    per_token = 4 * linear + 6 * lora
    return per_token * tokens + 4 * config.vocab_size * hidden * supervised + 7 * layers * queries * attended


def _counted_batches(job: Row) -> list[list[Example]]:
    made, size = jobs.counted(job), job["batch_size"]
    return [made[start : start + size] for start in range(0, len(made), size)]
