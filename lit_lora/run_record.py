"""The record of a run in its folder, and its closing words: what was proved, how fast, where the adapter is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_lora.atomic import atomic_write
from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    MemoryProfiler,
    Verdict,
)
from lit_lora.module import LoRALightningModule

PROVING = (ConvergenceAssertion, GradientFlowAssertion, GradientNormLogger, MemoryProfiler, HFAdapterExport)


class RunRecord(L.Callback):
    """Shows the adapters at the start; keeps ``metrics.json`` and ``metrics.csv`` up to date; prints the verdict."""

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print which layers have adapters."""
        if isinstance(pl_module, LoRALightningModule) and pl_module.injection_report is not None:
            print(pl_module.injection_report.table())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics so far."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics."""
        self.save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what there is."""
        if trainer.state.fn == "fit":
            self.save(trainer, pl_module)

    @rank_zero_only
    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics so far."""
        if not isinstance(pl_module, LoRALightningModule) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metrics = pl_module.flush_metrics()
        profilers = [c for c in trainer.callbacks if isinstance(c, MemoryProfiler)]  # type: ignore[attr-defined]
        if profilers:
            metrics.peak_memory_mib = max(profiler.peak_mib for profiler in profilers)
        if metrics.steps:
            metrics.save(Path(trainer.default_root_dir) / "metrics.json")

    @rank_zero_only
    def conclude(self, trainer: L.Trainer) -> None:
        """Print the verdict and write it to ``verdict.json``."""
        module = trainer.lightning_module
        verdicts = [
            callback.verdict
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, PROVING) and callback.verdict is not None
        ]
        lines = _closing_lines(module, verdicts) if isinstance(module, LoRALightningModule) else []
        print("\n".join(lines))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        record = json.dumps([verdict._asdict() for verdict in verdicts], indent=1)
        folder = Path(trainer.default_root_dir)
        atomic_write(folder / "verdict.json", lambda file: file.write(record.encode()))
        print(f"  {'run folder':<16}{folder}")


def _closing_lines(module: LoRALightningModule, verdicts: Sequence[Verdict]) -> list[str]:
    metrics = module.flush_metrics()
    failed = [verdict.name for verdict in verdicts if verdict.passed is False]
    if not metrics.steps:
        failed.append("no step was taken")
    lines = ["", f"lit_lora: {'NOT PROVED: ' + ', '.join(failed) if failed else 'proved'}"]
    if metrics.steps:
        first, last = metrics.steps[0], metrics.steps[-1]
        lines.append(f"  {'loss':<16}{first.loss:.3f} -> {last.loss:.3f} in {last.step} steps")
    for entry in metrics.validation[-1:]:
        start = f"{metrics.validation[0]['val_loss']:.3f} -> " if len(metrics.validation) > 1 else ""
        accuracy = f", token accuracy {entry['val_token_accuracy']:.1%}" if "val_token_accuracy" in entry else ""
        lines.append(f"  {'validation':<16}{start}{entry['val_loss']:.3f}{accuracy}")
    lines += [f"  {verdict.name:<16}{_mark(verdict)}{verdict.detail}" for verdict in verdicts]
    if len(metrics.steps) > 1:
        lines.append(f"  {'speed':<16}{metrics.tokens_per_s:,.0f} tokens/s")
    return lines


def _mark(verdict: Verdict) -> str:
    return {True: "", False: "FAILED: ", None: "not judged: "}[verdict.passed]


class PredictionWriter(BasePredictionWriter):
    """Writes generations to ``predictions.jsonl`` in the run folder, one JSON object a line."""

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all at once."""
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for batch in predictions for entry in batch]
        atomic_write(path, lambda file: file.write("".join(lines).encode()))
        print(f"{len(lines)} generations in {path}")
