"""When steps ended: by the host's clock on a CPU, by events in the stream on CUDA.

So no framework waits for the device because it is measured. The host waits after the first step, after the warm-up and
when the times are read. The part on CUDA is unverified on hardware.
"""

from __future__ import annotations

import time
from typing import Any


class StepClock:
    """Collects the ends of steps."""

    def __init__(self, *, on_cuda: bool, warm_up: int = 1) -> None:
        """Nothing has ended yet.

        Args:
            on_cuda: steps run on the current CUDA device.
            warm_up: after so many steps the host waits for the device, so that none of their work is counted.
        """
        self.on_cuda = on_cuda
        self._warm_up = warm_up
        self._ends: list[Any] = []
        self._first_end_s = 0.0

    def end(self) -> None:
        """After each step."""
        if not self.on_cuda:
            self._ends.append(time.time())
            return
        import torch

        self._ends.append(torch.cuda.Event(enable_timing=True))
        self._ends[-1].record()
        if len(self._ends) in (1, self._warm_up):
            torch.cuda.synchronize()
        self._first_end_s = self._first_end_s or time.time()

    def ends_s(self) -> list[float]:
        """The ends so far, on the host's clock; on CUDA counted from the first by the device."""
        if not self.on_cuda:
            return self._ends
        self._ends[-1].synchronize()
        return [self._first_end_s + self._ends[0].elapsed_time(end) / 1000 for end in self._ends]
