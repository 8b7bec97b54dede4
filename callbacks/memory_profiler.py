"""MemoryProfiler: memory by phase, a budget for it, and its growth over the run.

Phases are told apart by the hooks around them: load (until training starts), forward, backward, optimizer, validation,
and other (between steps: data loading, logging, checkpoints). Nothing here waits for the device.

Left out: which tensors are alive; use ``torch.cuda.memory._record_memory_history`` for that.
"""

from __future__ import annotations

import statistics
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_lora.callbacks._support.memory_meters import CudaMeter, MemoryMeter, ResidentMeter
from lit_lora.callbacks._support.trainer import (
    any_rank,
    is_logging_step,
    is_reading_step,
    log_details,
    log_metrics,
    state_key,
)
from lit_lora.callbacks.verdict import Check, NotProvedError, Verdict

_MIN_GROWTH_SAMPLES, _MAX_GROWTH_SAMPLES = 20, 2048
RECORDING = "forward"
"""The phase in which CUDA graphs are recorded."""
_ADVICE = {
    "load": "load a smaller or a quantized base (4 bits), or in bfloat16",
    "forward": "lower the batch size, max_length or max_tokens_per_batch, or turn gradient checkpointing on",
    "backward": "lower the batch size, max_length or max_tokens_per_batch, or turn gradient checkpointing on",
    "optimizer": "lower r or adapt fewer modules, or use an optimizer with smaller state",
    "validation": "lower the validation batch size",
    "other": "look at data loading, logging and checkpointing between steps",
}


class MemoryBudgetExceeded(NotProvedError):
    """A phase used more memory than the budget, or memory grew over the run by more than allowed."""


class _Growth:
    """Least-squares slope of the later half of a stream of points.

    A leak goes on; what an allocator takes until it has seen the largest batches comes to an end, and is not counted.
    At most ``_MAX_GROWTH_SAMPLES`` points are kept: at that number every second one goes, as does every second to come.
    """

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._stride, self._num_seen = 1, 0

    def add(self, x: float, y: float) -> None:
        if self._num_seen % self._stride == 0:
            self._points.append((x, y))
        self._num_seen += 1
        if len(self._points) == _MAX_GROWTH_SAMPLES:
            self._points = self._points[::2]
            self._stride *= 2

    @property
    def later_half(self) -> list[tuple[float, float]]:
        return self._points[len(self._points) // 2 :]

    @property
    def slope(self) -> float | None:
        """None for too few points."""
        points = self.later_half
        if len(points) < _MIN_GROWTH_SAMPLES:
            return None
        return statistics.linear_regression(*zip(*points, strict=True)).slope


class MemoryProfiler(Check):
    """Measures memory by phase, holds it against a budget, and measures its growth.

    On CUDA: what PyTorch has allocated on this process's device. Elsewhere: the resident memory of the process; see
    :class:`~lit_lora.callbacks._memory_meters.ResidentMeter` for how its peak is found. Peaks are reset at every phase,
    so other readers of ``torch.cuda.max_memory_allocated`` or ``ru_maxrss`` see the last phase only: read ``peak_mib``.

    Logged on logging steps (all in MiB):

    - ``memory/<phase>_peak_mib``: highest in the phase since the last logging step; to the loggers only.
    - ``memory/peak_mib``: highest of the run.
    - ``memory/allocated_mib``, ``memory/reserved_mib``: on CUDA, after the step.
    - ``memory/resident_mib``: elsewhere, after the step.
    - ``memory/peak_above_baseline_mib``: with ``baseline``, the highest of the run above the start.
    - ``memory/growth_mib_per_1000_steps``: least-squares slope over the later half of the steps since the
      warm-up.

    Args:
        budget_mib: most that any phase may use; None sets no budget. With ``baseline``, most above the baseline.
        on_exceeded: "stop" raises :class:`MemoryBudgetExceeded`, naming the phase; "warn" does so once per phase. With
            several processes, "stop" takes effect on logging steps, on all of them together.
        max_growth_mib_per_1000_steps: steepest growth that passes at the end of fit; None allows any.
        warmup_steps: optimizer steps left out of the growth: caches and allocators fill at first.
        baseline: count from the resident memory at construction (interpreter and libraries). Has no effect on CUDA,
            where the baseline is zero.
    """

    name = "memory"
    key = "memory"

    def __init__(
        self,
        *,
        budget_mib: float | None = None,
        on_exceeded: Literal["warn", "stop"] = "warn",
        max_growth_mib_per_1000_steps: float | None = None,
        warmup_steps: int = 20,
        baseline: bool = False,
    ) -> None:
        super().__init__()
        if budget_mib is not None and budget_mib <= 0:
            raise ValueError(f"budget_mib must be above 0, got {budget_mib}")
        if on_exceeded not in ("warn", "stop"):
            raise ValueError(f"on_exceeded must be 'warn' or 'stop', got {on_exceeded!r}")
        if on_exceeded == "stop" and budget_mib is None and max_growth_mib_per_1000_steps is None:
            raise ValueError("on_exceeded stop has no effect without budget_mib or max_growth_mib_per_1000_steps")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
        self.budget_mib = budget_mib
        self.on_exceeded = on_exceeded
        self.max_growth_mib_per_1000_steps = max_growth_mib_per_1000_steps
        self.warmup_steps = warmup_steps
        self.baseline = baseline
        self.peaks_mib: dict[str, float] = {}
        """Highest of the run by phase."""
        self._meter: MemoryMeter = ResidentMeter()
        self.baseline_mib = self._meter.current_mib() if baseline else 0.0
        self._phase: str | None = None
        self._recent_mib: dict[str, float] = {}
        self._exceeded: dict[str, float] = {}
        """Phases over the budget, and by how much they were at most."""
        self._growth = _Growth()
        self._first_step = self._last_step = 0

    @property
    def state_key(self) -> str:
        """One for all settings: peaks are judged by the budget of the run as it is resumed."""
        return state_key(self)

    @property
    def peak_mib(self) -> float:
        """Highest of the run, in any phase."""
        return max(self.peaks_mib.values(), default=0.0)

    @property
    def growth_mib_per_1000_steps(self) -> float | None:
        """Slope of the memory after each step, over the later half since the warm-up; None for too few steps."""
        slope = self._growth.slope
        return None if slope is None else slope * 1000

    @property
    def _is_asked(self) -> bool:
        return self.budget_mib is not None or self.max_growth_mib_per_1000_steps is not None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose the meter and enter the load phase."""
        if stage != "fit":
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self._meter, self.baseline_mib = CudaMeter(device), 0.0
        self._phase = None
        self._enter(trainer, "load")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the load phase."""
        super().on_fit_start(trainer, pl_module)
        self._enter(trainer, "other")
        self._check(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start to measure growth. It belongs to one process: a resumed run measures anew."""
        if self._exceeded and self.on_exceeded == "stop" and trainer.world_size == 1:  # before it was resumed
            raise MemoryBudgetExceeded(self._excess())
        self._check(trainer)
        self._growth = _Growth()
        self._first_step = self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Enter the forward phase."""
        self._enter(trainer, "forward")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Enter the backward phase."""
        self._enter(trainer, "backward")

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the backward phase."""
        self._enter(trainer, "other")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Enter the optimizer phase."""
        self._enter(trainer, "optimizer")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Leave the optimizer phase; measure, log and check after a step."""
        self._enter(trainer, "other")
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        current = self._meter.current_mib()
        if step - self._first_step > self.warmup_steps:
            self._growth.add(step, current)
        if trainer.world_size > 1 and is_reading_step(trainer, step):
            self._check(trainer)
        if is_logging_step(trainer, step):
            self._log(trainer, pl_module, current)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the validation phase."""
        self._enter(trainer, "validation")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the validation phase."""
        self._enter(trainer, "other")

    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Verdict:
        """Hold peaks and growth against what is allowed; what nothing is allowed for is a report."""
        self._close(trainer)
        growth = self.growth_mib_per_1000_steps
        allowed = self.max_growth_mib_per_1000_steps
        parts = [f"peak {self.peak_mib:.0f} MiB ({self._meter.method})"]
        failed = list(self._exceeded)
        if self.baseline:
            parts.append(f"{self.peak_mib - self.baseline_mib:.0f} MiB above the baseline")
        if self.budget_mib is not None:
            parts.append(f"budget {self.budget_mib:g} MiB")
            parts += [self._excess()] if self._exceeded else []
        parts.append(self._growth_said())
        if allowed is not None:
            parts.append(f"allowed {allowed:g}")
            if growth is not None and growth > allowed:
                failed.append("growth")
                parts.append("memory leaks: look for losses or outputs kept with their graph, and growing lists")
        asked = self._is_asked
        if not asked:
            parts.append("no bound set")
        passed: bool | None = None
        if any_rank(trainer, bool(failed)):
            passed = False
        elif asked and not any_rank(trainer, allowed is not None and growth is None):
            passed = True
        verdict = Verdict(self.name, passed, "; ".join(parts), asked)
        if "growth" in failed and self.on_exceeded == "warn":
            rank_zero_warn(f"{self.name}: {verdict.detail}")
        return verdict

    def raise_failure(self) -> None:
        """Raise where that was asked for."""
        if self.verdict is not None and self.verdict.passed is False and self.on_exceeded == "stop":
            raise MemoryBudgetExceeded(self.verdict.detail)

    def judge_early(self, trainer: pl.Trainer, exception: BaseException) -> Verdict:
        """The peak so far."""
        peak = f"peak {self.peak_mib:.0f} MiB before {type(exception).__name__}"
        over = self._excess() if self._exceeded else ""
        return Verdict(self.name, False if over else None, f"{peak}; {over}" if over else peak, self._is_asked)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the phase."""
        self._phase = None
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """Peaks so far, as plain types."""
        return {"peaks_mib": dict(self.peaks_mib), "baseline_mib": self.baseline_mib}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Peaks of the run include those before it was resumed, each above the baseline of its process."""
        moved = self.baseline_mib - state_dict.get("baseline_mib", 0.0) if self.baseline else 0.0
        for phase, peak in state_dict.get("peaks_mib", {}).items():
            self._take_peak(phase, peak + moved)

    def _enter(self, trainer: pl.Trainer, phase: str) -> None:
        self._close(trainer)
        self._phase = phase
        self._meter.reset_peak()

    def _close(self, trainer: pl.Trainer) -> None:
        phase, self._phase = self._phase, None
        if phase is None:
            return
        peak = self._meter.peak_mib(recording=phase == RECORDING)
        self._recent_mib[phase] = max(peak, self._recent_mib.get(phase, 0.0))
        first = phase not in self._exceeded
        if not self._take_peak(phase, peak):
            return
        if self.on_exceeded == "warn":
            if first:
                rank_zero_warn(self._message(phase))
        elif trainer.world_size == 1:
            raise MemoryBudgetExceeded(self._message(phase))

    def _take_peak(self, phase: str, peak: float) -> bool:
        """Add to the peaks of the run; whether it is over the budget."""
        self.peaks_mib[phase] = max(peak, self.peaks_mib.get(phase, 0.0))
        if self.budget_mib is None or peak - self.baseline_mib <= self.budget_mib:
            return False
        self._exceeded[phase] = max(peak - self.baseline_mib, self._exceeded.get(phase, 0.0))
        return True

    def _check(self, trainer: pl.Trainer) -> None:
        """Stop all processes together. Waits for the device, so only before training and on logging steps."""
        if self.budget_mib is None or self.on_exceeded == "warn" or trainer.world_size == 1:
            return
        if any_rank(trainer, bool(self._exceeded)):
            own = self._excess() if self._exceeded else "another process exceeded the memory budget"
            raise MemoryBudgetExceeded(own)

    def _excess(self) -> str:
        """The worst phase in full, the others by name."""
        worst = max(self._exceeded, key=lambda phase: self._exceeded[phase])
        others = ", ".join(phase for phase in self._exceeded if phase != worst)
        return self._message(worst) + (f"; also over it: {others}" if others else "")

    def _growth_said(self) -> str:
        growth = self.growth_mib_per_1000_steps
        if growth is None:
            return "growth not measured: too few steps"
        steps = [step for step, _ in self._growth.later_half]
        num_steps = steps[-1] - steps[0]
        grew = f"grew {growth * num_steps / 1000:.1f} MiB in the last {num_steps} steps"
        # Of a short run, the rate is mostly an allocator that still fills: said only to who set a bound for it.
        return grew if self.max_growth_mib_per_1000_steps is None else f"{grew} ({growth:.1f} MiB/1000 steps)"

    def _message(self, phase: str) -> str:
        above = " above the baseline" if self.baseline_mib else ""
        return (
            f"phase {phase} used {self._exceeded[phase]:.0f} MiB{above} ({self._meter.method}), "
            f"budget {self.budget_mib:g} MiB: {_ADVICE[phase]}"
        )

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, current: float) -> None:
        values = {"memory/peak_mib": self.peak_mib}
        if isinstance(self._meter, CudaMeter):
            values["memory/allocated_mib"] = current
            values["memory/reserved_mib"] = self._meter.reserved_mib()
        else:
            values["memory/resident_mib"] = current
        if self.baseline:
            values["memory/peak_above_baseline_mib"] = self.peak_mib - self.baseline_mib
        growth = self.growth_mib_per_1000_steps
        if growth is not None:
            values["memory/growth_mib_per_1000_steps"] = growth
        log_metrics(trainer, pl_module, values)
        phases = {f"memory/{phase}_peak_mib": peak for phase, peak in self._recent_mib.items()}
        log_details(trainer, self._last_step, phases)
        self._recent_mib.clear()
