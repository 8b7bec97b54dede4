"""Predict the peak memory of a training step, by tracing one with fake tensors (``traced_step.py``).

What is alive when is counted, not modelled (``storage_tracker.py``). Not counted: what a kernel takes and gives back
within one operator, the CUDA context (some hundred MB) and the workspace of cuBLAS (8 to 64 MiB), the interpreter and
its libraries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_lora.config import LoRAConfig, parse_bytes
from lit_lora.language_model.forward import ForwardPath
from lit_lora.memory.cuda_allocator import CudaPeak, replay
from lit_lora.memory.storage_tracker import GATHERED, Peak
from lit_lora.memory.traced_step import CATEGORIES, PHASES, StepSettings, trace_step


@dataclass(frozen=True)
class MemoryEstimate:
    """What a training step will take, in bytes."""

    settings: StepSettings
    phases: dict[str, Peak]
    """The highest moment of load, forward, backward and optimizer, and what is alive then by category."""
    cuda: CudaPeak
    """The same as CUDA's allocator would count it: in blocks of 512 bytes, and reserved in segments."""
    path: ForwardPath
    """How the batch was run, as far as the model's structure tells."""
    notes: tuple[str, ...] = field(default=())
    host_bytes: int = 0
    """Of the base in pinned memory of the host, if it is offloaded."""

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda phase: self.phases[phase].total)

    @property
    def peak(self) -> Peak:
        """The highest moment of all."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        """What must be there: on CUDA in whole blocks of its allocator."""
        return max(self.peak.total, self.cuda.allocated) if self.settings.device == "cuda" else self.peak.total

    def fits(self, limit: int | str) -> bool:
        """Whether the step stays within so many bytes, or within "12GB" or "8GiB"; on CUDA, what is reserved does."""
        needed = self.cuda.reserved if self.settings.device == "cuda" else self.peak_bytes
        return max(needed, self.peak_bytes) <= parse_bytes(limit)

    def __str__(self) -> str:
        lines = [str(self.settings), f"{'MB':<12}" + "".join(f"{phase:>11}" for phase in self.phases)]
        for category in CATEGORIES:
            if category == GATHERED and self.settings.devices == 1 and not self.settings.cpu_offload:
                continue
            values = [peak.by_category.get(category, 0) for peak in self.phases.values()]
            lines.append(f"{category:<12}" + "".join(f"{mb(value):>11}" for value in values))
        lines.append(f"{'total':<12}" + "".join(f"{mb(peak.total):>11}" for peak in self.phases.values()))
        lines.append(f"peak: {mb(self.peak.total)} MB in {self.peak_phase} ({self.peak.where})")
        if self.settings.device == "cuda":
            lines.append(
                f"CUDA: {mb(self.cuda.allocated)} MB allocated in blocks of 512 bytes, {mb(self.cuda.reserved)} MB "
                "reserved in segments; the CUDA context and cuBLAS's workspace come on top"
            )
        if self.settings.cpu_offload:
            lines.append(f"host: {mb(self.host_bytes)} MB of the base in pinned memory, in blocks of powers of two")
        return "\n".join([*lines, f"traced {self.path}", *self.notes])


def estimate_memory(
    base: str,
    *,
    lengths: Sequence[int],
    lora: LoRAConfig = LoRAConfig(),  # noqa: B008 (frozen)
    **settings: Any,
) -> MemoryEstimate:
    """Predict the peak memory of a training step.

    Args:
        base: as in ``load_base_model``; only its config is read. "random:" reads no file for a known architecture.
        lengths: tokens of each example of a micro-batch.
        lora: which layers get adapters, of what rank.
        settings: the other fields of :class:`StepSettings`.

    Raises:
        ValueError: for settings that the step itself would refuse.
    """
    return trace(StepSettings(base, lora, tuple(lengths), **settings))


def trace(settings: StepSettings) -> MemoryEstimate:
    """What one step with these settings takes.

    Raises:
        ValueError: for settings that the step itself would refuse.
    """
    traced = trace_step(settings)
    phases = {"load": traced.load, **{phase: traced.tracker.peak(phase) for phase in PHASES[1:]}}
    cuda = replay((event.key, event.num_bytes) for event in traced.tracker.events)
    return MemoryEstimate(settings, phases, cuda, traced.path, traced.notes, traced.host_bytes)


def mb(num_bytes: int) -> str:
    """Megabytes, of 10^6, to a tenth."""
    return f"{num_bytes / 1e6:,.1f}"
