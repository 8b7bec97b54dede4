"""ThroughputLogger: real tokens per second, and supervised ones, without slowing the run to measure it.

Lightning's ``ThroughputMonitor`` waits for the GPU after every micro-batch and takes all batches to be of one size.
Here counts that lie on the device stay there, and the GPU is waited for on logging steps only (and around validation,
whose time is left out).
"""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch

from lit_lora.callbacks._support.batch_counts import Count, count
from lit_lora.callbacks._support.trainer import is_logging_step, is_reading_step, log_metrics


class ThroughputLogger(pl.Callback):
    """Logs how much is trained on per second, over all processes.

    Tokens of a batch are, in this order: its ``num_tokens``, the sum of its ``attention_mask``, the size of its
    ``input_ids``. Supervised tokens: the size of its ``target_positions``, or its ``labels`` that are not -100.
    Samples: the size of its ``example_ids``, else the first dimension of the first tensor in it. The clock starts after
    the first optimizer step, which pays for the warm-up.

    Logged on logging steps, over the steps since the last one; a batch without tokens logs samples only:

    - ``throughput/tokens_per_s``, ``throughput/target_tokens_per_s``, ``throughput/samples_per_s``
    - ``throughput/step_time_s``: seconds per optimizer step.
    - ``throughput/num_tokens``: trained on since the start of the run, resumed parts included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0
        """Real tokens so far, over all processes; up to date after logging steps."""
        self.num_target_tokens = 0
        self.num_samples = 0
        self.timed_tokens = 0
        """Real tokens within ``timed_s``."""
        self.timed_s = 0.0
        """Seconds of training measured: without validation and without the first step."""
        self._counts: list[Count] = [0, 0, 0]
        self._clock_start_s: float | None = None
        self._clock_start_step = 0
        self._excluded_s = 0.0
        self._paused_at_s = 0.0
        self._last_step = 0

    @property
    def tokens_per_s(self) -> float:
        """Mean over the run."""
        return self.timed_tokens / self.timed_s if self.timed_s > 0 else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first step before timing."""
        self._clock_start_s = None
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log after a step."""
        self._counts = [total + new for total, new in zip(self._counts, count(batch), strict=True)]
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        if self._clock_start_s is None:
            self._read(trainer)
            self._start_clock(trainer)
        elif is_reading_step(trainer, step):
            tokens, targets, samples = self._read(trainer)
            elapsed = self._now(trainer) - self._clock_start_s - self._excluded_s
            num_steps = step - self._clock_start_step
            self.timed_s += elapsed
            self.timed_tokens += tokens
            if is_logging_step(trainer, step) and elapsed > 0:
                values = {
                    "throughput/samples_per_s": samples / elapsed,
                    "throughput/step_time_s": elapsed / num_steps,
                }
                if tokens:
                    values["throughput/tokens_per_s"] = tokens / elapsed
                    values["throughput/num_tokens"] = float(self.num_tokens)
                if targets:
                    values["throughput/target_tokens_per_s"] = targets / elapsed
                log_metrics(trainer, pl_module, values)
            self._start_clock(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        if self._clock_start_s is not None:
            self._paused_at_s = self._now(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again."""
        if self._clock_start_s is not None:
            self._excluded_s += self._now(trainer) - self._paused_at_s

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the totals up to date."""
        tokens, _, _ = self._read(trainer)
        if self._clock_start_s is not None and tokens:
            self.timed_s += self._now(trainer) - self._clock_start_s - self._excluded_s
            self.timed_tokens += tokens
        self._clock_start_s = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop the clock: validation may run on its own after this."""
        self._clock_start_s = None

    def state_dict(self) -> dict[str, Any]:
        """Totals as plain types, as of the last logging step."""
        return {
            "num_tokens": self.num_tokens,
            "num_target_tokens": self.num_target_tokens,
            "num_samples": self.num_samples,
            "timed_tokens": self.timed_tokens,
            "timed_s": self.timed_s,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; what an older state lacks starts at zero."""
        self.num_tokens = state_dict.get("num_tokens", 0)
        self.num_target_tokens = state_dict.get("num_target_tokens", 0)
        self.num_samples = state_dict.get("num_samples", 0)
        self.timed_tokens = state_dict.get("timed_tokens", 0)
        self.timed_s = state_dict.get("timed_s", 0.0)

    def _start_clock(self, trainer: pl.Trainer) -> None:
        self._clock_start_s = self._now(trainer)
        self._clock_start_step = trainer.global_step
        self._excluded_s = 0.0

    def _now(self, trainer: pl.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)  # logging steps and the ends of validation only
        return time.perf_counter()

    def _read(self, trainer: pl.Trainer) -> tuple[int, int, int]:
        """Counts since the last call, over all processes, added to the totals. Waits for the device; a collective."""
        device = trainer.strategy.root_device
        counts = torch.stack([torch.as_tensor(c, dtype=torch.int64).to(device) for c in self._counts])
        if trainer.world_size > 1:
            counts = torch.as_tensor(trainer.strategy.reduce(counts, reduce_op="sum"))
        tokens, targets, samples = (int(value) for value in counts.tolist())
        self._counts = [0, 0, 0]
        self.num_tokens += tokens
        self.num_target_tokens += targets
        self.num_samples += samples
        return tokens, targets, samples
