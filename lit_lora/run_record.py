"""The record of a run in its folder, and its closing words: what was proved, how fast, where the adapter is.

A record that cannot be written (full disk, permission lost) is a warning while training goes on, and tried again at the
next save; only at the end of the run is it an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_lora.atomic import atomic_write, make_folder, remove_partial_files
from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    MemoryProfiler,
    Verdict,
)
from lit_lora.csv_log import PatientCSVLogger
from lit_lora.module import LoRALightningModule

PROVING = (ConvergenceAssertion, GradientFlowAssertion, GradientNormLogger, MemoryProfiler, HFAdapterExport)


class RunRecord(L.Callback):
    """Shows the adapters at the start; keeps ``metrics.json`` and ``metrics.csv`` up to date; prints the verdict."""

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None
        """Why the newest metrics are not on disk; None if they are."""
        self._started = False

    @rank_zero_only
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the run folder, and remove what a killed process left half-written in it.

        Raises:
            OSError: if it cannot be made or written to.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        make_folder(folder, option="trainer.default_root_dir")
        for place in (folder, *folder.glob("logs/version_*")):
            remove_partial_files(place)

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print which layers have adapters."""
        if isinstance(pl_module, LoRALightningModule) and pl_module.injection_report is not None:
            print(pl_module.injection_report.table())

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on there is something to record."""
        self._started = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics so far."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics."""
        self.save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what there is; what ended the run is the error to show, so this never raises."""
        if not self._started:  # a refused resume leaves the record as it was
            return
        try:
            self.save(trainer, pl_module)
        except Exception as error:  # metrics may wait for a device that has failed
            rank_zero_warn(f"The record was not written after the exception: {error!r}")

    @rank_zero_only
    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics so far; a failed write is a warning, the first of several in a row."""
        if not isinstance(pl_module, LoRALightningModule) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metrics = pl_module.flush_metrics()
        profilers = [c for c in trainer.callbacks if isinstance(c, MemoryProfiler)]  # type: ignore[attr-defined]
        if profilers:
            metrics.peak_memory_mib = max(profiler.peak_mib for profiler in profilers)
        if not metrics.steps:
            return
        try:
            metrics.save(Path(trainer.default_root_dir) / "metrics.json")
        except OSError as error:
            if self.failure is None:
                rank_zero_warn(
                    f"The record of step {trainer.global_step} was not written: {error}. Training goes on and tries "
                    "again at the next save."
                )
            self.failure = str(error)
        else:
            self.failure = None

    @rank_zero_only
    def conclude(self, trainer: L.Trainer) -> None:
        """Print the verdict and write it to ``verdict.json``.

        Raises:
            OSError: if a part of the record could not be written, after all of it was tried.
        """
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
        if self.failure is not None:
            self.save(trainer, module)
        logs = [logger for logger in trainer.loggers if isinstance(logger, PatientCSVLogger)]
        for log in logs:
            log.save()
        failures = [failure for failure in (self.failure, *(log.failure for log in logs)) if failure is not None]
        try:
            atomic_write(folder / "verdict.json", lambda file: file.write(record.encode()))
        except OSError as error:
            failures.append(str(error))
        if failures:
            raise OSError(f"the record of the run could not be written: {'; '.join(failures)}")
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
        num_cut = sum(entry.get("cut", False) for batch in predictions for entry in batch)
        if num_cut and isinstance(pl_module, LoRALightningModule):
            print(f"{num_cut} of {len(lines)} were cut at model.max_new_tokens={pl_module.max_new_tokens}")
