"""A run that proves itself: the Trainer's parts that ``lit-lora fit`` and a script have in common.

Example::

    outcome = lit_lora.fit(LoRALightningModule("smollm2-135m-instruct"), SFTDataModule("my.jsonl"), max_steps=100)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger

from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    MemoryProfiler,
    RankMonitor,
    StepProgress,
    ThroughputLogger,
    TrainingCheckpoint,
)
from lit_lora.callbacks._support.trainer import why_past_its_end
from lit_lora.files.checkpoint import AtomicCheckpointIO, read_checkpoint
from lit_lora.files.csv_log import PatientCSVLogger
from lit_lora.files.environment import ALLOCATION_VARIABLES
from lit_lora.module import LoRALightningModule
from lit_lora.report.outcome import Outcome, read_outcome
from lit_lora.runs.config_file import ConfigFile
from lit_lora.runs.forgetting import Forgetting
from lit_lora.runs.run_record import RunRecord
from lit_lora.runs.said import readable
from lit_lora.runs.start import choose_start, one_run
from lit_lora.training.hyperparameters import KnowsSettings, plain

CALLBACKS: dict[str, type[Callback]] = {
    "gradient_norm": GradientNormLogger,
    "memory": MemoryProfiler,
    "convergence": ConvergenceAssertion,
    "gradient_flow": GradientFlowAssertion,
    "forgetting": Forgetting,
    "throughput": ThroughputLogger,
    "progress": StepProgress,
    "export": HFAdapterExport,
    "checkpoint": TrainingCheckpoint,
}
"""What watches, proves, saves and shows a run, by its key on the command line."""

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/run",
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "enable_checkpointing": True,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": -1,  # the whole validation set once before training: the loss to compare with
}
"""Where they differ from Lightning's."""


def fit(
    module: LoRALightningModule,
    data: LightningDataModule,
    folder: str | Path = "runs/run",
    *,
    resume: str | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 42,
    quiet: bool = False,
    report: bool = True,
    **trainer: Any,
) -> Outcome | None:
    """Fine-tune from a script, with all that ``lit-lora fit`` does: record, checks, verdict, export, exact resume.

    Args:
        module: what is trained.
        data: what it is trained on.
        folder: of the run; the first free one of that name with -2, -3, ... for a new run.
        resume: a checkpoint, a folder of them, or "last"; None starts a new run.
        callbacks: in place of the ones of their class that are there anyway (``ConvergenceAssertion(0.5)``), or more.
        seed: of adapters, dropout and whatever else draws random numbers.
        quiet: print the verdict only; warnings and errors are shown in any case.
        report: write ``report.html``, a page to look at, into the folder at the end.
        trainer: settings of Lightning's Trainer: ``max_steps``, ``gradient_clip_val``, ...

    Returns:
        What the run has to say of itself: ``result`` is "proved", "not proved" or "not judged". It is printed, too.
        None in the processes that the first one has started.

    Raises:
        ValueError: for settings, data or a checkpoint that no run can go well with.
        NotProvedError: for a check that was to end the run.
    """
    for name, value in ALLOCATION_VARIABLES.items():
        os.environ.setdefault(name, value)
    settings = {**TRAINER_DEFAULTS, **trainer}
    checkpoints = next((c for c in callbacks if isinstance(c, TrainingCheckpoint)), None)
    ends = {name: settings.get(name) for name in ("max_steps", "max_epochs")}
    with one_run(), readable(quiet=quiet):
        start = choose_start(
            folder,
            resume,
            ends,
            dirpath=checkpoints.dirpath if checkpoints is not None else None,
            trial=bool(settings.get("fast_dev_run")),
        )
        try:
            L.seed_everything(seed, verbose=False)
            kinds = tuple(type(callback) for callback in callbacks)
            config = ConfigFile(lambda: _settings(module, data, settings, seed))
            record = RunRecord(is_over=is_over(start.checkpoint, start.folder, config), report=report)
            settings["default_root_dir"] = start.folder
            shown = as_shown(settings, callbacks, quiet=quiet)
            out = left_out(shown, callbacks) | {"forgetting"}  # which measures on a sample that is given
            standard = [kind() for key, kind in CALLBACKS.items() if kind not in kinds and key not in out]
            built = Trainer(**wired(shown, [*standard, *callbacks, record, config]))
            built.fit(module, datamodule=data, ckpt_path=start.checkpoint)
            return concluded(built, module, data, record, config)
        finally:
            if start.claimed is not None:
                start.claimed.release()


def wired(settings: Mapping[str, Any], callbacks: Sequence[Callback], *, logger: bool = True) -> dict[str, Any]:
    """Settings of a Trainer with callbacks, a log in the run's folder and atomic checkpoints.

    Args:
        settings: of the Trainer.
        callbacks: beside its own.
        logger: whether to log where the settings do not say.
    """
    found = dict(settings)
    if found.get("logger") is None:
        log: Logger | bool = PatientCSVLogger(found["default_root_dir"], name="logs") if logger else False
        found["logger"] = log
    found["plugins"] = [*_listed(found.get("plugins")), AtomicCheckpointIO()]
    found["callbacks"] = [*_listed(found.get("callbacks")), RankMonitor(), *callbacks]
    return found


def as_shown(settings: Mapping[str, Any], callbacks: Sequence[Callback], *, quiet: bool) -> dict[str, Any]:
    """Settings of a Trainer, of a quiet one without a progress bar.

    Raises:
        ValueError: for a progress bar that a quiet run was given.
    """
    if not quiet:
        return dict(settings)
    if bars := _progress_bars(settings, callbacks):
        raise ValueError(
            f"a quiet run shows no progress, and was given {type(bars[0]).__name__}: leave one of them out"
        )
    return {**settings, "enable_progress_bar": False}


def left_out(settings: Mapping[str, Any], callbacks: Sequence[Callback] = ()) -> set[str]:
    """Keys of :data:`CALLBACKS` that these settings of a Trainer leave no place for.

    Args:
        settings: of the Trainer.
        callbacks: beside its own. Lightning takes one progress bar: the user's.
    """
    switched_off = settings.get("enable_progress_bar") is False or settings.get("barebones")
    return {
        *(["checkpoint"] if settings.get("enable_checkpointing") is False else []),
        *(["progress"] if switched_off or _progress_bars(settings, callbacks) else []),
    }


def _progress_bars(settings: Mapping[str, Any], callbacks: Sequence[Callback]) -> list[Any]:
    return [
        callback for callback in (*_listed(settings.get("callbacks")), *callbacks) if isinstance(callback, ProgressBar)
    ]


def is_over(checkpoint: str | None, folder: str, config: ConfigFile) -> bool:
    """Whether a run that something ended early is resumed just as it ended."""
    earlier = read_outcome(folder) if checkpoint else None
    if earlier is None or not (earlier.finished and earlier.stopped_early) or config.differs(folder):
        return False
    return bool(read_checkpoint(str(checkpoint))["global_step"] == earlier.step)


def concluded(
    trainer: Trainer, module: LoRALightningModule, data: LightningDataModule, record: RunRecord, config: ConfigFile
) -> Outcome | None:
    """Validate where training did not end with it, then say what the run proved, and where its results are."""
    if record.finished(trainer) is None and not why_past_its_end(trainer):
        validated = [entry["step"] for entry in module.training_metrics.validation]
        if getattr(data, "validation_data", None) is not None and trainer.global_step not in validated:
            trainer.validate(module, datamodule=data, verbose=False)
            record.save(trainer, module)
        config.write(trainer)  # where no step was left to take, none is there yet
    return record.conclude(trainer)


def _settings(
    module: LoRALightningModule, data: LightningDataModule, trainer: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    given: Callable[[Any], Any] = plain
    return {
        "model": given(module.settings()),
        "data": given(data.settings()) if isinstance(data, KnowsSettings) else type(data).__name__,
        "trainer": given(dict(trainer)),
        "seed_everything": seed,
    }


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
