"""Reading how much memory is in use, and the highest since a moment: CUDA's allocator, or the process's resident set.

Neither waits for the device: CUDA's counters are kept by the allocator on the CPU.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil
import torch

MIB = 2**20


class MemoryMeter(Protocol):
    """Something that measures memory in MiB."""

    @property
    def method(self) -> str:
        """How peaks are found, for reports."""
        ...

    def current_mib(self) -> float:
        """In use now."""
        ...

    def peak_mib(self, *, recording: bool = False) -> float:
        """Highest since :meth:`reset_peak`; see :class:`CudaMeter` for ``recording``."""
        ...

    def reset_peak(self) -> None:
        """Forget the peak."""
        ...


class CudaMeter:
    """Memory allocated by PyTorch on one CUDA device.

    What CUDA graphs compute in lies in pools of their own, which nobody else can have. The allocator counts what they
    use while they are recorded, and not any more after that; so such pools are counted here as a whole.
    """

    method = "CUDA allocator"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._reserved, self._held = 0, 0

    def current_mib(self) -> float:
        """Allocated now, or held for CUDA graphs."""
        return self._read().now / MIB

    def reserved_mib(self) -> float:
        """Held by the allocator now, in use or not."""
        return self._read().reserved / MIB

    def peak_mib(self, *, recording: bool = False) -> float:
        """Highest.

        Args:
            recording: whether a graph may have been recorded since the last reset, so that the highest that the
                allocator saw may have lain in a pool already.
        """
        read = self._read()
        return (max(read.peak, read.now) if recording else read.peak + read.held) / MIB

    def reset_peak(self) -> None:
        """Forget the peak, for every reader of ``torch.cuda.max_memory_allocated``."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def _read(self) -> _Read:
        # In one question: a flat dictionary of all counters is made for each of torch's functions that ask for one.
        counters = torch.cuda.memory_stats_as_nested_dict(self.device)
        if not counters:  # before the first allocation
            return _Read(0, 0, 0, 0)
        allocated, reserved = counters["allocated_bytes"]["all"], counters["reserved_bytes"]["all"]["current"]
        if reserved != self._reserved:
            self._reserved, self._held = reserved, self._held_by_graphs()
        return _Read(allocated["current"] + self._held, allocated["peak"], reserved, self._held)

    def _held_by_graphs(self) -> int:
        segments = [s for s in torch.cuda.memory_snapshot() if s["device"] == self.device.index]
        pools = [segment for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0)]
        return sum(segment["total_size"] - segment["allocated_size"] for segment in pools)


class _Read(NamedTuple):
    """In bytes."""

    now: int
    peak: int
    reserved: int
    held: int
    """By pools of graphs, and not allocated."""


class ResidentMeter:
    """Resident memory of this process.

    On Linux the kernel keeps the peak (``VmHWM``) and forgets it on request (``/proc/self/clear_refs``, see proc(5)).
    Where it does not, the peak is the higher of the readings at the two ends of a phase: what rises and falls within a
    phase is missed, and ``method`` says so.
    """

    def __init__(self) -> None:
        self._start_mib = self.current_mib()
        self._kernel_keeps_peak: bool | None = None  # unknown before the first reset: trying it out is a reset

    @property
    def method(self) -> str:
        """How peaks are found, for reports."""
        return "kernel's resident peak" if self._kernel_keeps_peak else "resident memory at phase boundaries"

    def current_mib(self) -> float:
        """Resident now."""
        return _process(os.getpid()).memory_info().rss / MIB

    def peak_mib(self, *, recording: bool = False) -> float:
        """Highest resident, see the class."""
        return _peak_kib() / 1024 if self._kernel_keeps_peak else max(self.current_mib(), self._start_mib)

    def reset_peak(self) -> None:
        """Forget the peak, for every reader of ``VmHWM`` and ``ru_maxrss``."""
        if self._kernel_keeps_peak is None:
            self._kernel_keeps_peak = _kernel_forgets_peak_on_request()
        if self._kernel_keeps_peak:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._start_mib = self.current_mib()


@functools.cache
def _process(pid: int) -> psutil.Process:
    """Kept here, and not in the meter: it holds a lock, which neither pickle nor deepcopy takes."""
    return psutil.Process(pid)


def _peak_kib() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(match[1]) if match else 0


def _kernel_forgets_peak_on_request() -> bool:
    """Try it: raise the resident memory, let go, and see whether the peak comes down after the request."""
    try:
        # Of the system's own: malloc may hold as much already, and then neither taking nor freeing it changes anything.
        with mmap.mmap(-1, 40 * MIB) as ballast:
            ballast[::4096] = b"x" * len(range(0, len(ballast), 4096))
            before = _peak_kib()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return 0 < _peak_kib() < before - 8 * 1024
    except OSError:
        return False
