"""Callbacks that measure a run and prove it: for any LightningModule, with or without lit_lora's own.

The names load on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "ConvergenceAssertion": "convergence",
    "ConvergenceError": "convergence",
    "GradientFlowAssertion": "gradient_flow",
    "GradientFlowError": "gradient_flow",
    "GradientNormLogger": "gradient_norm",
    "HFAdapterExport": "adapter_export",
    "MemoryBudgetExceeded": "memory_profiler",
    "MemoryProfiler": "memory_profiler",
    "NonFiniteError": "gradient_norm",
    "RankMonitor": "rank_monitor",
    "StepProgress": "step_progress",
    "ThroughputLogger": "throughput",
    "TrainingCheckpoint": "training_checkpoint",
    "Verdict": "verdict",
}
__all__ = [
    "ConvergenceAssertion",
    "ConvergenceError",
    "GradientFlowAssertion",
    "GradientFlowError",
    "GradientNormLogger",
    "HFAdapterExport",
    "MemoryBudgetExceeded",
    "MemoryProfiler",
    "NonFiniteError",
    "RankMonitor",
    "StepProgress",
    "ThroughputLogger",
    "TrainingCheckpoint",
    "Verdict",
]

if TYPE_CHECKING:
    from lit_lora.callbacks.adapter_export import HFAdapterExport
    from lit_lora.callbacks.convergence import ConvergenceAssertion, ConvergenceError
    from lit_lora.callbacks.gradient_flow import GradientFlowAssertion, GradientFlowError
    from lit_lora.callbacks.gradient_norm import GradientNormLogger, NonFiniteError
    from lit_lora.callbacks.memory_profiler import MemoryBudgetExceeded, MemoryProfiler
    from lit_lora.callbacks.rank_monitor import RankMonitor
    from lit_lora.callbacks.step_progress import StepProgress
    from lit_lora.callbacks.throughput import ThroughputLogger
    from lit_lora.callbacks.training_checkpoint import TrainingCheckpoint
    from lit_lora.callbacks.verdict import Verdict


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lit_lora.callbacks' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lit_lora.callbacks.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
