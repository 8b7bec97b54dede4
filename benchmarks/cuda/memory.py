"""Memory of real training steps on a device, next to the estimate and the bound, and how long a context fits.

Setups, bounds and methods are those of ``memory_table.py``; the steps are those of a ``fit`` through Lightning, all
tokens supervised, and what counts is the second step and later, when the optimizer has its state.

Three numbers of a peak: *allocated* in tensors (what the estimate predicts), *reserved* by torch's allocator (what the
bound is held against), and *used* as the driver reports it for the whole device, with the CUDA context and whatever
else runs there. cuBLAS's workspaces are tensors of torch's allocator and no part of the estimate: they are measured, by
giving them back at the end, and taken off what the estimate is compared with.

Run on an H100; of the longest contexts, none yet.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from benchmarks.cuda.data import config_of, dense, tokenized
from benchmarks.cuda.worker import Row
from benchmarks.memory_table import DQ, METHODS, SETUPS, Setup
from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, StepConfig
from lit_lora.data.batches.packing import collate_packed
from lit_lora.memory.estimate import estimate_memory

LORA = "LoRA, bf16"
ESTIMATE_TOLERANCE = 0.05
"""Of the allocated peak, cuBLAS's workspaces apart."""
CONTEXT_LIMITS_GB = (8, 12, 16, 24)
GRANULARITY = 256
"""How closely the longest context is found, in tokens."""
NUM_STEPS = 3
PRECISION = 32
"""The longest context is confirmed to ``GRANULARITY``, or to this part of it, whichever is longer."""
MAX_ATTEMPTS = 8


def setups_of(model: str) -> list[Setup]:
    """Those of the README's table; a small one, without a bound, for the tiny model."""
    known = [setup for setup in SETUPS if setup.model == model and setup.r == 16 and DQ in setup.bounds]
    return known or [Setup(model, (64,) * 2, True, 16, "all-linear")]


def settings_of(setup: Setup, method: str, base: str, device: str) -> Row:
    """Of :func:`peaks` and :func:`estimates`."""
    return {
        "base": base, "lengths": list(setup.batch), "checkpointing": setup.checkpointing, "r": setup.r,
        "method": method, "device": device, "bound": setup.bounds.get(method),
    }  # fmt: skip


def estimates(settings: Row) -> Row:
    """What a step on CUDA is predicted to take. Where CUDA is hidden, operators are traced as on a CPU."""
    start_s = time.perf_counter()
    found = estimate_memory(
        settings["base"],
        lengths=settings["lengths"],
        lora=LoRAConfig(r=settings["r"]),
        quantization=METHODS[settings["method"]],
        step=StepConfig(recompute=settings["checkpointing"]),
        device="cuda",
    )
    return {
        "estimated_allocated_mb": found.cuda.allocated / 1e6,
        "estimated_reserved_mb": found.cuda.reserved / 1e6,
        "trace_s": time.perf_counter() - start_s,
    }


def peaks(settings: Row) -> Row:
    """Peaks of real steps; with ``trace``, the estimate too, made afterwards in the same process, which has CUDA."""
    on_cuda = settings["device"] == "cuda"
    found = _train(settings)
    if not on_cuda:
        return {"status": "needs CUDA", **found}
    if settings["bound"] is not None:
        found["holds"] = found["reserved_mb"] * 1e6 <= settings["bound"]
    if settings.get("trace"):
        gc.collect()
        torch.cuda.empty_cache()
        found |= estimates(settings)
        found |= compare(found)
    return found


def compare(found: Row) -> Row:
    """How far the estimate is from the allocated peak without cuBLAS's workspaces, and whether that is close enough."""
    measured = found["allocated_mb"] - found["workspace_mb"]
    error = found["estimated_allocated_mb"] / measured - 1
    return {"estimate_error": error, "estimate_within": abs(error) <= ESTIMATE_TOLERANCE}


def _train(settings: Row) -> Row:
    on_cuda = settings["device"] == "cuda"
    before = _driver_used_bytes() if on_cuda else 0
    module = LoRALightningModule(
        settings["base"],
        lora=LoRAConfig(r=settings["r"]),
        quantization=METHODS[settings["method"]],
        step=StepConfig(recompute=settings["checkpointing"]),
    )
    lengths = settings["lengths"]
    made: Any = tokenized(dense(lengths * NUM_STEPS, config_of(settings["base"]).vocab_size))
    callback = _Peaks()
    trainer = L.Trainer(
        accelerator="gpu" if on_cuda else "cpu", devices=1, max_steps=NUM_STEPS, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, DataLoader(made, batch_size=len(lengths), collate_fn=collate_packed))
    assert callback.num_steps == NUM_STEPS, f"{callback.num_steps} steps"
    losses = module.flush_metrics().losses
    if not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"losses {losses}")
    return {"num_steps": callback.num_steps, "context_mb": before / 1e6, **callback.found}


class _Peaks(L.Callback):
    """Peaks from the second step on, read before Lightning moves the model off the device."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.found: Row = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, *_: Any) -> None:
        self.num_steps += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.device.type != "cuda":
            return
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        used, now = _driver_used_bytes(), torch.cuda.memory_allocated()
        torch._C._cuda_clearCublasWorkspaces()  # no public way to tell how large they are (torch 2.13)
        workspace = now - torch.cuda.memory_allocated()
        sizes = {"allocated": allocated, "reserved": reserved, "driver_used": used, "workspace": workspace}
        self.found = {f"{name}_mb": size / 1e6 for name, size in sizes.items()}


def _driver_used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


# ---------------------------------------------------------------------- the longest context


def longest_estimate(settings: Row) -> Row:
    """The longest single example whose estimated step reserves no more than ``limit_bytes``."""
    traced: dict[int, int] = {}

    def need(length: int) -> int:
        if length not in traced:
            found = estimate_memory(
                settings["base"], lengths=[length], lora=LoRAConfig(r=settings["r"]),
                quantization=QuantizationConfig(), step=StepConfig(recompute=True), device="cuda",
            )  # fmt: skip
            traced[length] = found.cuda.reserved
        return traced[length]

    length = longest_fitting(need, settings["limit_bytes"])
    return {"estimated_tokens": length, "num_traces": len(traced)}


def longest_fitting(need: Callable[[int], int], limit: int, *, granularity: int = GRANULARITY) -> int:
    """A length that needs no more than ``limit``, while one step longer needs more; 0 if the shortest does.

    A step is ``granularity``, or a part in ``2 * PRECISION`` of the length where that is longer. The need grows nearly
    in proportion, so each guess lies where a straight line through the bracket's ends meets the limit; every other one
    halves the bracket.

    Args:
        need: bytes for a length, growing with it.
        limit: bytes.
        granularity: tokens.
    """
    low, high = 1, 8
    if need(low * granularity) > limit:
        return 0
    while need(high * granularity) <= limit:
        low, high = high, high * 4
    halve = False
    while high - low > max(1, low // (2 * PRECISION)):
        below, above = need(low * granularity), need(high * granularity)
        share = 0.5 if halve else (limit - below) / (above - below)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        halve = not halve
        low, high = (middle, high) if need(middle * granularity) <= limit else (low, middle)
    return low * granularity


def longest_context(settings: Row) -> Row:
    """Really run steps around the estimated length, with the allocator held to ``limit_bytes`` less the context's."""
    device = settings["device"]
    limit, estimated = settings["limit_bytes"], settings["estimated_tokens"]
    on_cuda = device == "cuda"
    context = _driver_used_bytes() if on_cuda else 0
    if on_cuda:
        total = torch.cuda.get_device_properties(0).total_memory
        if limit > total:
            return {"status": f"needs a device of {limit / 1e9:.0f} GB"}
        torch.cuda.set_per_process_memory_fraction((limit - context) / total)
    with torch.device(device):
        module = LoRALightningModule(
            settings["base"], lora=LoRAConfig(r=settings["r"]), quantization=QuantizationConfig(),
            step=StepConfig(recompute=True),
        )  # fmt: skip
        module.configure_model()
    parameters = list(module.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tried: dict[int, bool] = {}

    def fits(length: int) -> bool:
        tried[length] = _step_fits(module, optimizer, length, device)
        return tried[length]

    if not on_cuda:
        fits(GRANULARITY)
        return {"status": "needs CUDA", "context_mb": 0.0, "tried": str(tried)}
    fits(GRANULARITY)  # with it come the optimizer's state and the gradients of a step before
    tried.clear()
    reached, failed = confirm(fits, estimated, settings["seconds"])
    return {
        "reached_tokens": reached,
        "failed_tokens": failed,
        "context_mb": context / 1e6,
        "reserved_mb": torch.cuda.max_memory_reserved() / 1e6,
        "tried": " ".join(f"{length}:{'fits' if did else 'no'}" for length, did in tried.items()),
    }


def confirm(fits: Callable[[int], bool], estimated: int, seconds: float) -> tuple[int, int | None]:
    """Longest length that was seen to fit and shortest seen not to, starting from an estimate, in few attempts.

    Args:
        fits: tries a length.
        estimated: where to start.
        seconds: no attempt starts that, taking twice as long as the last, would end after so many.
    """
    end_s = time.monotonic() + seconds
    low, high = 0, None
    length = max(estimated // GRANULARITY, 1)
    stride = precision = max(length // PRECISION, 1)
    for _ in range(MAX_ATTEMPTS):
        start_s = time.monotonic()
        if fits(length * GRANULARITY):
            low = length
        else:
            high = length
        settled = high is not None and high - low <= precision
        if settled or 3 * time.monotonic() - 2 * start_s > end_s:
            break
        if high is None:
            length, stride = low + stride, stride * 2
        elif low == 0:
            length, stride = max(high - stride, 1), stride * 2
        else:
            length = (low + high) // 2
    return low * GRANULARITY, None if high is None else high * GRANULARITY


def _step_fits(module: LoRALightningModule, optimizer: torch.optim.Optimizer, length: int, device: str) -> bool:
    """The loss of ``training_step``, its backward pass and the update, as ``run_step`` orders them."""
    batch = collate_packed(tokenized(dense([length], config_of(module.base).vocab_size)))
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    try:
        loss = module.compute_loss(batch).loss_sum / length
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        fitted = False
    else:
        fitted = True
    loss = None  # type: ignore[assignment] # lets go of what the failed step held
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return fitted
