"""When steps ended: by the host's clock on a CPU, by events in the stream on CUDA; and what one more step launches.

So no framework waits for the device because it is measured. The host waits after the first step, after the warm-up,
before and after the profiled step and when the times are read.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

NUM_LARGEST = 12
"""Kernels that are named, those that take longest."""


class StepClock:
    """Collects the ends of steps."""

    def __init__(self, *, on_cuda: bool, warm_up: int = 1, last: int | None = None, profile: bool = False) -> None:
        """Nothing has ended yet.

        Args:
            on_cuda: steps run on the current CUDA device.
            warm_up: after so many steps the host waits for the device, so that none of their work is counted.
            last: so many steps are timed, the warm-up included; then the memory that is reserved is read.
            profile: the step after the last one runs under torch's profiler.
        """
        self.on_cuda = on_cuda
        self.profiled: dict[str, Any] = {}
        """What the profiled step did: kernels, copies, waits and the device's time; empty without one."""
        self._warm_up = warm_up
        self._last = last
        self._profile = profile
        self.reserved_bytes = 0
        self._profiler: Any = None
        self._ends: list[Any] = []
        self._first_end_s = 0.0

    def end(self) -> None:
        """After each step."""
        if self._profiler is not None:
            self._stop_profiling()
            return
        if not self.on_cuda:
            self._ends.append(time.time())
        else:
            import torch

            self._ends.append(torch.cuda.Event(enable_timing=True))
            self._ends[-1].record()
            if len(self._ends) in (1, self._warm_up):
                torch.cuda.synchronize()
            self._first_end_s = self._first_end_s or time.time()
        if len(self._ends) == self._last:
            self._after_last()

    def ends_s(self) -> list[float]:
        """The ends so far, on the host's clock; on CUDA counted from the first by the device."""
        if not self.on_cuda:
            return self._ends
        self._ends[-1].synchronize()
        return [self._first_end_s + self._ends[0].elapsed_time(end) / 1000 for end in self._ends]

    def _after_last(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        if self.on_cuda:
            torch.cuda.synchronize()
            self.reserved_bytes = torch.cuda.memory_reserved()
        if not self._profile:
            return
        activity = ProfilerActivity.CUDA if self.on_cuda else ProfilerActivity.CPU
        self._profiler = profile(activities=[activity], acc_events=True)
        self._profiler.start()

    def _stop_profiling(self) -> None:
        import torch

        if self.on_cuda:
            torch.cuda.synchronize()
        self._profiler.stop()
        self.profiled = tally(self._profiler.events())
        self._profiler = None


def tally(events: Iterable[Any]) -> dict[str, Any]:
    """Kernels, copies (with fills) and waits of a profiled step, the device's time for them, and the longest kernels.

    The last wait is the clock's own, before the profiler stops, and is not counted.
    """
    times_us: Counter[str] = Counter()
    num_kernels = num_copies = num_waits = 0
    copies_us = 0.0
    for event in events:
        elapsed_us = event.time_range.elapsed_us()
        if event.device_type.name != "CUDA":
            num_waits += event.name.startswith("cuda") and event.name.endswith("Synchronize")
        elif event.name.startswith(("Memcpy", "Memset")):
            num_copies += 1
            copies_us += elapsed_us
        else:
            num_kernels += 1
            times_us[event.name] += elapsed_us
    largest = [f"{time_us / 1000:.2f} ms {name[:80]}" for name, time_us in times_us.most_common(NUM_LARGEST)]
    return {
        "launches": num_kernels,
        "copies": num_copies,
        "waits": max(num_waits - 1, 0),
        "gpu_ms": (sum(times_us.values()) + copies_us) / 1000,
        "longest_kernels": "; ".join(largest),
    }
