"""Loss spikes and gradient explosions, told from a running window of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

MIN_HISTORY = 10
"""Steps before anything is reported: at the start of training all moves."""

_MIN_RELATIVE_STD = 0.01  # floor under the spread, so that a flat loss does not make a spike of every ripple


class SpikeWatch:
    """Warns of outliers, with their step, and counts them.

    Args:
        window: steps that a value is measured against.
        spike_std: standard deviations above the window's mean at which a loss is a spike.
        explosion_factor: multiple of the window's median at which a gradient norm is an explosion, if it is also above
            the median of the run's first steps: a model that has learned its data has norms near zero, and an example
            that it does not know yet is then no explosion.
    """

    def __init__(self, window: int, spike_std: float, explosion_factor: float) -> None:
        self.spike_std = spike_std
        self.explosion_factor = explosion_factor
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)
        self.first_norms: list[float] = []
        self.num_spikes = 0
        self.num_explosions = 0
        self.max_norm = 0.0
        self.max_norm_step = 0

    def add_loss(self, step: int, loss: float) -> None:
        """Compare a loss with the window, and take it in."""
        if len(self.losses) >= MIN_HISTORY:
            mean = statistics.fmean(self.losses)
            variance = statistics.fmean((x - mean) ** 2 for x in self.losses)
            spread = max(math.sqrt(variance), _MIN_RELATIVE_STD * abs(mean))
            if loss > mean + self.spike_std * spread:
                self.num_spikes += 1
                rank_zero_warn(
                    f"loss spike at step {step}: {loss:.4g}, {(loss - mean) / spread:.1f} standard deviations above "
                    f"the running mean {mean:.4g}"
                )
        self.losses.append(loss)

    def add_norm(self, step: int, norm: float) -> None:
        """Compare a gradient norm with the window, and take it in."""
        if norm > self.max_norm or not self.max_norm_step:
            self.max_norm, self.max_norm_step = norm, step
        if len(self.norms) >= MIN_HISTORY:
            median = statistics.median(self.norms)
            if norm > self.explosion_factor * median > 0 and norm > statistics.median(self.first_norms):
                self.num_explosions += 1
                rank_zero_warn(f"gradient explosion at step {step}: norm {norm:.4g}, running median {median:.4g}")
        self.norms.append(norm)
        if len(self.first_norms) < MIN_HISTORY:
            self.first_norms.append(norm)

    def state_dict(self) -> dict[str, Any]:
        """Windows and counts as plain types."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "first_norms": list(self.first_norms),
            "num_spikes": self.num_spikes,
            "num_explosions": self.num_explosions,
            "max_norm": self.max_norm,
            "max_norm_step": self.max_norm_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; what an older state lacks starts empty."""
        self.losses.extend(state_dict.get("losses", []))
        self.norms.extend(state_dict.get("norms", []))
        self.first_norms = list(state_dict.get("first_norms", self.norms))[:MIN_HISTORY]
        self.num_spikes = state_dict.get("num_spikes", 0)
        self.num_explosions = state_dict.get("num_explosions", 0)
        self.max_norm = state_dict.get("max_norm", 0.0)
        self.max_norm_step = state_dict.get("max_norm_step", 0)
