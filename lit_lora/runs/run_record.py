"""The record of a run in its folder, and its closing words: what was proved, how fast, where the adapter is.

A record that cannot be written (full disk, permission lost) is a warning while training goes on, and tried again at the
next save; only at the end of the run is it an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_lora.base.base_hash import base_hash
from lit_lora.callbacks import HFAdapterExport, Verdict
from lit_lora.callbacks._support.trainer import why_past_its_end
from lit_lora.callbacks.verdict import Check, NotProvedError
from lit_lora.files.atomic import atomic_text, make_folder, remove_partial_files
from lit_lora.files.csv_log import PatientCSVLogger
from lit_lora.metrics import FILE_NAME
from lit_lora.module import LoRALightningModule
from lit_lora.report.circumstances import add_start, circumstances, described
from lit_lora.report.outcome import Outcome, read_outcome
from lit_lora.report.page import write_report
from lit_lora.runs.forgetting import Forgetting
from lit_lora.runs.sha256sums import write_sums
from lit_lora.runs.trackers import tell_trackers

RECORD = "record"
"""Name of the verdict on a record that is not whole."""


class RunRecord(L.Callback):
    """Shows the adapters at the start; keeps the metrics in ``metrics.jsonl``; prints the verdict.

    What a finished run has said of itself stays: resumed without a step left to take, it says the same again.

    Args:
        is_over: whether the run is resumed as it ended, by something else than its number of steps or epochs (early
            stopping, a limit of time): it is then not trained on.
        report: write a page to look at into the folder, at the end of the run, however that comes.
    """

    def __init__(self, *, is_over: bool = False, report: bool = True) -> None:
        super().__init__()
        self.is_over = is_over
        self.report = report
        self._started = self._ended = self._stopped_early = False

    @rank_zero_only
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the run folder, remove what a killed process left half-written in it, and let the metrics be kept there.

        Raises:
            OSError: if it cannot be made or written to.
        """
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        make_folder(folder, option="trainer.default_root_dir")
        for place in (folder, *folder.glob("logs/version_*")):
            remove_partial_files(place)
        if isinstance(pl_module, LoRALightningModule):
            pl_module.metrics_record.keep_in(folder)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which layers have adapters, on which base, and what they are trained on."""
        self._started = self._ended = False
        trainer.should_stop = trainer.should_stop or self.is_over
        if trainer.is_global_zero and isinstance(pl_module, LoRALightningModule) and pl_module.injection_report:
            assert pl_module.model is not None
            rank_zero_info(pl_module.injection_report.table())
            if pl_module.started_from:
                rank_zero_info(f"adapter:   {pl_module.started_from[:12]}, of {pl_module.adapter}, is trained on")
            rank_zero_info(f"base:      {base_hash(pl_module.model)}")
            rank_zero_info(f"device:    {_device(trainer)}")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on there is something to record."""
        self._started = True
        self._note_circumstances(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics so far."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics."""
        self._ended = True
        at_its_end = trainer.global_step == trainer.max_steps or trainer.current_epoch == trainer.max_epochs
        self._stopped_early = trainer.should_stop and not at_its_end
        self.save(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write what there is; what ended the run is the error to show, so this never raises.

        A check that failed has its say: where it did so after the last step, the run has come to its end.
        """
        if not self._started:  # a refused resume leaves the record as it was
            if isinstance(exception, NotProvedError) and (earlier := self.finished(trainer)) is not None:
                print(earlier)
            return
        try:
            self.save(trainer, pl_module)
            if any(check.verdict is not None and check.verdict.passed is False for check in _checks(trainer)):
                self.conclude(trainer)
            else:
                self._write_report(trainer)
        except Exception as error:  # metrics may wait for a device that has failed
            rank_zero_warn(f"The record was not written after the exception: {error!r}")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand the verdicts of a finished run to the checks; whether its adapter is still there is looked at again."""
        if (earlier := self.finished(trainer)) is None:
            return
        verdicts = {verdict.name: verdict for verdict in earlier.verdicts}
        for check in _checks(trainer):
            if check.verdict is None and not isinstance(check, HFAdapterExport):
                check.verdict = verdicts.get(check.name)

    @rank_zero_only
    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the metrics so far; a failed write is a warning, the first of several in a row."""
        if isinstance(pl_module, LoRALightningModule) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            pl_module.save_metrics()

    def finished(self, trainer: L.Trainer) -> Outcome | None:
        """What the run had said of itself when it came to this very step, if the last fit took no further one."""
        earlier = None if self._started or why_past_its_end(trainer) else read_outcome(trainer.default_root_dir)
        return earlier if earlier is not None and earlier.finished and earlier.step == trainer.global_step else None

    @rank_zero_only
    def conclude(self, trainer: L.Trainer) -> Outcome:
        """Print what the run has to say of itself, and write it to ``verdict.json``.

        Raises:
            OSError: if a part of the record could not be written, after all of it was tried.
        """
        folder = Path(trainer.default_root_dir)
        earlier = self.finished(trainer)
        outcome = self._outcome(trainer, earlier)
        print(outcome)
        if trainer.fast_dev_run or outcome.no_step_left:  # type: ignore[attr-defined]
            return outcome
        failures = [] if outcome == earlier else self._write(trainer, outcome, measured=earlier is None)
        if failures:
            raise OSError(f"the record of the run could not be written: {'; '.join(failures)}")
        if self._started or earlier is None:
            tell_trackers(trainer, outcome)
            self._write_report(trainer)
            write_sums(folder)
        print(f"  {'run folder':<16}{folder}")
        return outcome

    @rank_zero_only
    def _note_circumstances(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        entry = circumstances(step=trainer.global_step, device=_device(trainer), num_processes=trainer.world_size)
        data = described(trainer.datamodule)  # type: ignore[attr-defined]  # public, set outside of the class
        for check in _checks(trainer):
            if isinstance(check, Forgetting) and check.examples is not None:
                data["sha256"] |= {"forgetting data": check.examples.digest()}
        try:
            add_start(Path(trainer.default_root_dir), entry, data)
        except OSError as error:
            rank_zero_warn(f"Where the run runs was not recorded: {error}")

    @rank_zero_only
    def _write_report(self, trainer: L.Trainer) -> None:
        """The page is made from what has been recorded; where it fails, that stays, and so does the outcome."""
        if not self.report or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = trainer.default_root_dir
        try:
            path = write_report(folder)
        except Exception as error:  # whatever a chart cannot be made of, a run has been trained
            rank_zero_warn(f"The report was not written: {error!r}. Try again with `lit-lora report {folder}`")
        else:
            print(f"  {'report':<16}{path}")

    def _outcome(self, trainer: L.Trainer, earlier: Outcome | None) -> Outcome:
        verdicts = [check.verdict or Verdict(check.name, None, "not judged") for check in _checks(trainer)]
        module = trainer.lightning_module
        ours = module if isinstance(module, LoRALightningModule) else None
        measured = _measured(ours) if ours is not None else {}
        lost = _lost(ours, trainer.global_step) if ours is not None else []
        if earlier is not None:
            # Its adapter may have gone since, or have been written only now, and so may its record have: that is what
            # to look at again.
            exports = {check.name: check.verdict for check in _checks(trainer) if isinstance(check, HFAdapterExport)}
            found = [(verdict, exports.get(verdict.name) or verdict) for verdict in earlier.verdicts]
            kept = [was if was.passed == now.passed else now for was, now in found if was.name != RECORD]
            return replace(earlier, verdicts=[*kept, *lost])
        return Outcome(
            step=trainer.global_step,
            verdicts=[*verdicts, *lost],
            finished=self._ended or not self._started,
            stopped_early=self._stopped_early,
            no_step_left="" if self._started else why_past_its_end(trainer),
            **measured,
        )

    def _write(self, trainer: L.Trainer, outcome: Outcome, *, measured: bool) -> list[str]:
        """Write all of the record, of the metrics too where there may be new ones; what could not be written."""
        module = trainer.lightning_module
        failures = []
        if measured and isinstance(module, LoRALightningModule):
            self.save(trainer, module)
            failures.append(module.metrics_record.failure)
        for log in trainer.loggers:
            if isinstance(log, PatientCSVLogger):
                log.save()
                failures.append(log.failure)
        try:
            outcome.save(Path(trainer.default_root_dir))
        except OSError as error:
            failures.append(str(error))
        return [failure for failure in failures if failure is not None]


def _device(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{name}, {trainer.world_size} processes"


def _checks(trainer: L.Trainer) -> list[Check]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Check)]  # type: ignore[attr-defined]


def _lost(module: LoRALightningModule, num_steps: int) -> list[Verdict]:
    """Says of a run whose record was not there when it was resumed that its metrics cannot be looked at as a whole."""
    recorded = len(module.training_metrics.steps)
    if recorded >= num_steps:
        return []
    detail = (
        f"{FILE_NAME} holds {recorded} of {num_steps} steps: the earlier ones were not there when the run was resumed"
    )
    return [Verdict(RECORD, None, detail)]


def _measured(module: LoRALightningModule) -> dict[str, Any]:
    """Lines on losses and speed of the whole run, the hash of its base, and what was changed."""
    metrics = module.flush_metrics()
    lines = []
    if steps := [step for step in metrics.steps if step.num_target_tokens]:
        first, last = steps[0], steps[-1]
        lines.append(f"  {'loss':<16}{first.loss:.3f} -> {last.loss:.3f} in {len(metrics.steps)} steps")
    for source, losses in metrics.validation_losses.items():
        entry = metrics.validation[-1]
        is_whole = not source and "val_token_accuracy" in entry
        accuracy = f", token accuracy {entry['val_token_accuracy']:.1%}" if is_whole else ""
        name = f"  on {source} " if source else "validation"
        lines.append(f"  {name:<16}{' -> '.join(f'{loss:.3f}' for loss in losses)}{accuracy}")
    speed = [f"  {'speed':<16}{metrics.tokens_per_s:,.0f} tokens/s"] if len(metrics.steps) > 1 else []
    assert module.model is not None
    base = base_hash(module.model).value
    found = {"losses": lines, "speed": speed, "base": base, "changes": module.setting_changes}
    return found | {"adapter": module.started_from}


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
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for batch in predictions for entry in batch]
        atomic_text(path, "".join(lines))
        print(f"{len(lines)} generations in {path}")
        num_cut = sum(entry.get("cut", False) for batch in predictions for entry in batch)
        if num_cut and isinstance(pl_module, LoRALightningModule):
            print(f"{num_cut} of {len(lines)} were cut at model.max_new_tokens={pl_module.max_new_tokens}")
