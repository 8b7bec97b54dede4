"""What to change so that a step takes less: each change traced, not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_lora.config import QuantizationConfig
from lit_lora.memory.estimate import MemoryEstimate, mb, trace
from lit_lora.memory.traced_step import StepSettings


@dataclass(frozen=True)
class Suggestion:
    """A change, and what a step with it takes."""

    change: str
    estimate: MemoryEstimate

    def __str__(self) -> str:
        return f"{self.change}: {mb(self.estimate.peak_bytes)} MB"


def suggest(estimate: MemoryEstimate, limit: int | str | None = None) -> list[Suggestion]:
    """Changes that lower the peak, best first; with a limit, also the shortest row of them together that meets it.

    Each is traced, so this takes a few times as long as the estimate.
    """
    found = []
    for name, settings in _changes(estimate.settings):
        changed = trace(settings)
        if changed.peak_bytes < estimate.peak_bytes:
            found.append(Suggestion(name, changed))
    found.sort(key=lambda suggestion: suggestion.estimate.peak_bytes)
    if limit is None or not found or any(suggestion.estimate.fits(limit) for suggestion in found):
        return found
    names, current = [found[0].change], found[0].estimate
    for suggestion in found[1:]:
        change = dict(_changes(current.settings)).get(suggestion.change)
        if change is None or current.fits(limit):
            continue
        changed = trace(change)
        if changed.peak_bytes < current.peak_bytes:
            names, current = [*names, suggestion.change], changed
    return [Suggestion(" + ".join(names), current), *found] if len(names) > 1 else found


def _changes(settings: StepSettings) -> Iterator[tuple[str, StepSettings]]:
    devices = 2 * settings.devices
    offloads = settings.cpu_offload
    name = "lora_sharded_cpu_offload" if offloads else "lora_sharded"
    yield f"trainer.strategy {name} with trainer.devices {devices}", replace(settings, devices=devices)
    if settings.device == "cuda" and not offloads:
        yield "trainer.strategy lora_sharded_cpu_offload", replace(settings, cpu_offload=True)
    if settings.step.recompute is not True:
        yield "model.step.recompute true", replace(settings, step=replace(settings.step, recompute=True))
    if settings.quantization is None:
        yield "model.quantization.bits 4", replace(settings, quantization=QuantizationConfig())
    elif settings.quantization.embedding_bits is None:
        eight_bit = replace(settings.quantization, embedding_bits=8)
        yield "model.quantization.embedding_bits 8", replace(settings, quantization=eight_bit)
    count = len(settings.lengths)
    if count > 1:
        yield "half as many examples in a batch", replace(settings, lengths=settings.lengths[: count // 2])
    elif settings.lengths[0] >= 64:
        yield "data.max_length halved", replace(settings, lengths=(settings.lengths[0] // 2,))
    if settings.lora.r >= 4 and settings.adapter is None:
        rank = settings.lora.r // 4
        yield f"model.lora.r {rank}", replace(settings, lora=replace(settings.lora, r=rank))
