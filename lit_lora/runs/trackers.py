"""The verdict of a run for its trackers: TensorBoard, MLflow, W&B and whatever else Lightning has a logger for.

As metrics, which every tracker can compare over runs, and in words beside the settings. Settings themselves are logged
at the start (``training/hyperparameters.py``).
"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.report.outcome import Outcome


def verdict_metrics(outcome: Outcome) -> dict[str, float]:
    """``verdict/proved`` (1 or 0), ``verdict/failed_checks``, and ``verdict/<check>`` (1 or 0) of all that judged."""
    found = {f"verdict/{verdict.name}": verdict.passed for verdict in outcome.verdicts if verdict.passed is not None}
    metrics = {name.replace(" ", "_"): float(passed) for name, passed in found.items()}
    failed = sum(verdict.passed is False for verdict in outcome.verdicts)
    return {"verdict/proved": float(outcome.result == "proved"), "verdict/failed_checks": float(failed), **metrics}


def tell_trackers(trainer: L.Trainer, outcome: Outcome) -> None:
    """Log the verdict everywhere; a tracker that cannot be reached is a warning: ``verdict.json`` has it.

    Args:
        trainer: after fit; its loggers take more all the same.
        outcome: what the run has to say of itself.
    """
    reasons = ", ".join(outcome.reasons)
    for logger in trainer.loggers:
        try:
            logger.log_metrics(verdict_metrics(outcome), step=max(0, outcome.step - 1))  # counted from 0, as others are
            if isinstance(logger, TensorBoardLogger):  # of the settings, TensorBoard shows what was logged first
                logger.experiment.add_text("verdict", f"{outcome.result}: {reasons}".removesuffix(": "))
            elif trainer.enable_autolog_hparams:
                logger.log_hyperparams({"verdict": {"result": outcome.result, "reasons": reasons}})
            logger.save()
        except Exception as error:  # of a library, a server or a network; nothing of the run depends on it
            rank_zero_warn(f"The verdict did not reach {type(logger).__name__}: {error!r}")
