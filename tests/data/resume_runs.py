"""Real Trainer runs that record what they are trained on, stopped and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_lora.data.batches.resume import align_loop_progress
from lit_lora.data.datamodule import SFTDataModule

NUM_EXAMPLES, BATCHES, EPOCHS = 10, 5, 3

SMALL_RUNS = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
"""Marks: what Lightning warns of here is how the runs are."""


class Stopped(Exception):
    """Stands for whatever ends a run early."""


class Recorder(pl.LightningModule):
    """One weight whose value depends on every batch and their order."""

    def __init__(self, align: bool, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.align = align
        self.fail_at = fail_at
        self.seen: list[list[int]] = []
        self.epochs: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append(self.trainer.current_epoch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.fail_at == len(self.seen):
            raise Stopped
        self.seen.append(batch["example_ids"].tolist())
        return (self.weight * batch["target_ids"].double().mean() / 100 + torch.rand(()) * 0).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert batch["num_tokens"] > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.align:
            align_loop_progress(checkpoint, self.trainer)


class SaveAt(pl.Callback):
    """Saves at one moment and ends the run there."""

    def __init__(self, path: Path, hook: str, batches: int) -> None:
        self.path = path
        self.hook = hook
        self.batches = batches

    def _save(self, hook: str, trainer: pl.Trainer, module: Recorder) -> None:
        if hook == self.hook and len(module.seen) == self.batches and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            if hook != "on_exception":
                raise Stopped

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self._save("on_train_batch_end", trainer, module)

    def on_train_epoch_start(self, trainer, module) -> None:
        self._save("on_train_epoch_start", trainer, module)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._save("on_train_epoch_end", trainer, module)

    def on_validation_end(self, trainer, module) -> None:
        self._save("on_validation_end", trainer, module)

    def on_exception(self, trainer, module, exception) -> None:
        self._save("on_exception", trainer, module)


def data_module(data_file: Path, **options: Any) -> SFTDataModule:
    options = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": data_file.parent / "cache"} | options
    return SFTDataModule(str(data_file), **options)


def trainer(**options: Any) -> pl.Trainer:
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(
    data_file: Path,
    module: Recorder,
    *,
    ckpt_path: Path | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Recorder:
    trainer(**options).fit(module, datamodule=data_module(data_file, **data or {}), ckpt_path=ckpt_path)
    return module


def stop_and_resume(
    data_file: Path,
    tmp_path: Path,
    hook: str,
    batches: int,
    *,
    align: bool = True,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Recorder, list[list[int]], Recorder]:
    """The uninterrupted run, what the stopped run saw, and the resumed run."""
    path = tmp_path / "stopped.ckpt"
    first = Recorder(align, fail_at=batches if hook == "on_exception" else None)
    with pytest.raises(Stopped):
        run(data_file, first, data=data, callbacks=[SaveAt(path, hook, batches)], **options)
    resumed = run(data_file, Recorder(align), ckpt_path=path, data=data, **options)
    return whole_run(data_file, data, options), first.seen, resumed


WHOLE_RUNS: dict[str, Recorder] = {}


def whole_run(data_file: Path, data: dict[str, Any] | None, options: dict[str, Any]) -> Recorder:
    key = repr((data, options))
    if key not in WHOLE_RUNS:
        WHOLE_RUNS[key] = run(data_file, Recorder(align=True), data=data, **options)
    return WHOLE_RUNS[key]
