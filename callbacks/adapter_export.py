"""HFAdapterExport: the adapter as a folder that PEFT, transformers and vLLM load, written while training runs.

Two folders: the last adapter and the one with the best validation. The model may hold lit_lora's adapters, written by
``save_adapter``, or PEFT's own (a ``PeftModel`` in someone else's module), written by PEFT into a temporary folder and
then moved into place. Either way every file is replaced whole, and an earlier adapter stays until the new one is
complete.

Left out: saving on exceptions; what an interrupted run had is in its checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import operator
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_lora.base.trained_on import noted
from lit_lora.callbacks._support.trainer import KnowsChanges, state_key, writes_files
from lit_lora.callbacks.training_checkpoint import TrainingCheckpoint
from lit_lora.callbacks.verdict import Check, Verdict
from lit_lora.files.atomic import atomic_write, remove_partial_files
from lit_lora.interchange.model_card import model_card
from lit_lora.interchange.peft_format import (
    CARD_NAME,
    CONFIG_NAME,
    adapter_state_dict,
    from_peft_config,
    is_whole_adapter,
    save_adapter,
)

log = logging.getLogger(__name__)


class HFAdapterExport(Check):
    """Writes the adapter in PEFT's format, with a model card, and the datamodule's ``tokenizer`` where it has one.

    The last adapter goes to ``<default_root_dir>/adapter`` at the end of fit (and every ``every_n_steps``), the best
    one to ``<default_root_dir>/adapter-best`` after each validation that improves ``monitor``. A write that fails (full
    disk, missing permission) is logged with its folder and tried again at the next save; the earlier adapter is kept.
    Only a failure at the end of fit raises. A resumed run that has no step left writes what is missing or not of its
    last state; the best adapter comes back from its checkpoint, if a :class:`TrainingCheckpoint` kept it.

    The first process writes; all wait for it. Logs no metrics.

    Args:
        folder: where the last adapter goes; None for the default above.
        best_folder: where the best adapter goes; None for the default above.
        monitor: logged metric that decides which adapter is best; None writes the last one only.
        mode: "min" if a lower ``monitor`` is better, else "max".
        every_n_steps: optimizer steps between saves of the last adapter; None saves at the end only.
        model_attr: attribute of the module that holds the model with the adapters; dots lead further down, and "" is
            the module itself.
        base_model_name: Hub id or folder of the base; taken from a transformers model if None.
        data: what was trained on, for the model card; the datamodule's name and settings if None.
        portable: fold scales into the weights, for tools without rank patterns; see ``save_adapter``.
    """

    name = "adapter export"
    key = "export"
    without_effect = frozenset(
        {"folder", "best_folder", "every_n_steps", "model_attr", "base_model_name", "data", "portable"}
    )

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        best_folder: str | Path | None = None,
        monitor: str | None = "val_loss",
        mode: Literal["min", "max"] = "min",
        every_n_steps: int | None = None,
        model_attr: str = "model",
        base_model_name: str | None = None,
        data: str | None = None,
        portable: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if best_folder is not None and monitor is None:
            raise ValueError("best_folder has no effect without monitor: name the metric that decides")
        self.folder = Path(folder) if folder is not None else None
        self.best_folder = Path(best_folder) if best_folder is not None else None
        self.monitor = monitor
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.model_attr = model_attr
        self.base_model_name = base_model_name
        self.data = data
        self.portable = portable
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._failed: dict[str, str] = {}
        """Folders whose last write failed, and why."""
        self._last_step = 0
        self._started = False
        self._validated_without_monitor = False

    @property
    def state_key(self) -> str:
        """Names what the state depends on."""
        return state_key(self, monitor=self.monitor, mode=self.mode, model_attr=self.model_attr)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a run that would have nothing to export; remove what a killed process left half-written."""
        super().on_fit_start(trainer, pl_module)
        self._failed.clear()
        self._started = False
        if writes_files(trainer):
            for folder in (self._folder(trainer), self._best_folder(trainer)):
                remove_partial_files(folder)
        model = self._model(pl_module)
        if adapter_state_dict(model):
            return
        if not _is_peft_model(model):
            raise ValueError(
                f"{type(pl_module).__name__}.{self.model_attr or 'self'} ({type(model).__name__}) holds no adapters of "
                "lit_lora and is no PEFT model: call inject_lora on it, or set model_attr to the model that has them"
            )
        if self.portable:
            raise ValueError("portable has no effect on a PEFT model, which PEFT writes: leave it at False")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from here."""
        self._last_step = trainer.global_step
        self._started = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save the last adapter where its interval is over."""
        step = trainer.global_step
        if self.every_n_steps is None or step == self._last_step:
            return
        self._last_step = step
        if step % self.every_n_steps == 0:
            self._save(trainer, pl_module, self._folder(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the best adapter if this is it."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            self._validated_without_monitor = True
            return
        # The first process decides: a metric that is not synchronised differs between them.
        score = trainer.strategy.broadcast(float(value))
        better = self.best_score is None or (score < self.best_score if self.mode == "min" else score > self.best_score)
        if not math.isfinite(score) or not better:
            return
        if self._save(trainer, pl_module, self._best_folder(trainer)):
            self.best_score, self.best_step = score, trainer.global_step

    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Verdict:
        """Save the last adapter, and see that the best one is there."""
        name = self.name
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # public, set outside of the class
            return Verdict(name, None, "a trial run writes nothing")
        if trainer.global_step == 0:
            return Verdict(name, None, "no optimizer step was taken, so there is nothing to export")
        folder = self._folder(trainer)
        if self._started or not trainer.strategy.broadcast(self._is_current(trainer, pl_module, folder)):
            self._save(trainer, pl_module, folder)
        best = ""
        if self.best_score is not None:
            best = f"; best {self.monitor} {self.best_score:.6g} at step {self.best_step}"
            if missing := self._bring_back_best(trainer, pl_module):
                return Verdict(name, False, f"{folder}{best}, but {missing}")
        elif self._validated_without_monitor:
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            rank_zero_warn(f"no best adapter was saved: {self.monitor} was never logged in validation; logged: {known}")
        if self._failed:
            return Verdict(name, False, "; ".join(self._failed.values()))
        rank_zero_info(f"adapter written to {folder}{best}")
        return Verdict(name, True, f"{folder}{best}")

    def raise_failure(self) -> None:
        """Raise for an adapter that is not on disk."""
        if self._failed:
            raise OSError(f"the adapter could not be written: {'; '.join(self._failed.values())}")

    def judge_early(self, trainer: pl.Trainer, exception: BaseException) -> Verdict:
        """No answer."""
        return Verdict(self.name, None, f"ended early after step {trainer.global_step}")

    def state_dict(self) -> dict[str, Any]:
        """The best so far, as plain types."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; without one, the first validation is the best."""
        self.best_score = state_dict.get("best_score")
        self.best_step = state_dict.get("best_step")

    def _folder(self, trainer: pl.Trainer) -> Path:
        return self.folder or Path(trainer.default_root_dir) / "adapter"

    def _best_folder(self, trainer: pl.Trainer) -> Path:
        return self.best_folder or Path(trainer.default_root_dir) / "adapter-best"

    def _model(self, pl_module: pl.LightningModule) -> nn.Module:
        if not self.model_attr:
            return pl_module
        try:
            model = operator.attrgetter(self.model_attr)(pl_module)
        except AttributeError as error:
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ValueError(
                f"{type(pl_module).__name__} has no attribute {self.model_attr!r}: set model_attr to the sub-module "
                f"that holds the adapters (it has: {children}), or to '' for the module itself"
            ) from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"model_attr={self.model_attr!r} is a {type(model).__name__}, expected an nn.Module")
        return model

    def _is_current(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> bool:
        """Whether the folder holds the adapter as it is: equal ones make equal files. PEFT's own is not compared."""
        model = self._model(pl_module)
        if not trainer.is_global_zero or not adapter_state_dict(model):
            return False
        with tempfile.TemporaryDirectory() as written:
            self._save_adapter(trainer, model, Path(written))
            pairs = [(folder / new.name, new) for new in Path(written).iterdir()]
            return all(there.is_file() and there.read_bytes() == new.read_bytes() for there, new in pairs)

    def _save_adapter(self, trainer: pl.Trainer, model: nn.Module, folder: Path) -> None:
        save_adapter(
            model,
            folder,
            base_model_name=self.base_model_name,
            portable=self.portable,
            tokenizer=_tokenizer_of(trainer),
        )

    def _bring_back_best(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """Write the best adapter again where it is gone or damaged; why that cannot be done, or empty."""
        folder = self._best_folder(trainer)
        if trainer.strategy.broadcast(is_whole_adapter(folder) if trainer.is_global_zero else None):
            return ""
        paths = [c.best_path for c in trainer.callbacks if isinstance(c, TrainingCheckpoint)]  # type: ignore[attr-defined]
        path = next(filter(None, paths), None)
        read: dict[str, Any] = trainer.strategy.checkpoint_io.load_checkpoint(path) if path is not None else {}
        if read.get("global_step") != self.best_step:
            return f"{folder} is no longer there, and neither is its checkpoint"
        own = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        last = {name: p.detach().clone() for name, p in own.items()}
        try:
            _copy(read["state_dict"], own)
            self._save(trainer, pl_module, folder)
        finally:
            _copy(last, own)
        return ""

    def _save(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> bool:
        """Write on the first process; every process learns how it went, which is also the barrier."""
        outcome: tuple[str, str] | None = None
        if writes_files(trainer):
            try:
                self._write(trainer, pl_module, folder)
            except OSError as error:
                outcome = ("OSError", f"{folder}: {error}")
            except ValueError as error:
                outcome = ("ValueError", f"{folder}: {error}")
        outcome = trainer.strategy.broadcast(outcome)
        self._failed.pop(str(folder), None)
        if outcome is None:
            return True
        kind, reason = outcome
        if kind == "ValueError":
            self.verdict = Verdict(self.name, False, reason)
            raise ValueError(f"the adapter of step {trainer.global_step} cannot be written: {reason}")
        self._failed[str(folder)] = reason
        log.error(f"the adapter of step {trainer.global_step} was not written; the earlier one is kept: {reason}")
        return False

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> None:
        model = self._model(pl_module)
        if adapter_state_dict(model):
            self._save_adapter(trainer, model, folder)
        else:
            _save_peft_model(model, folder, _tokenizer_of(trainer))
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        try:
            config = from_peft_config(content)
        except ValueError:  # a PEFT adapter that lit_lora does not implement: PEFT's own card stays
            return
        card = model_card(
            config,
            base_model_name=self.base_model_name or content.get("base_model_name_or_path"),
            data=self.data if self.data is not None else _data_of(trainer),
            hyperparameters=_hyperparameters(trainer, pl_module),
            results=_results(trainer),
            record=noted(model),
        )
        atomic_write(folder / CARD_NAME, lambda stream: stream.write(card.encode()))


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _is_peft_model(model: nn.Module) -> bool:
    # By what it can do: importing peft takes seconds, and it may not be installed.
    return hasattr(model, "peft_config") and hasattr(model, "save_pretrained")


def _save_peft_model(model: Any, folder: Path, tokenizer: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".partial") as partial:
        model.save_pretrained(partial)
        source = next(Path(partial).rglob(CONFIG_NAME)).parent  # in a sub-folder unless the adapter is called "default"
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        files = sorted(path for path in source.iterdir() if path.is_file())
        for path in files:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for path in sorted(files, key=lambda path: path.name == CONFIG_NAME):  # the config last: it makes the folder
            os.replace(path, folder / path.name)


def _tokenizer_of(trainer: pl.Trainer) -> Any:
    """The datamodule's tokenizer, if it has one that can be saved."""
    tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]  # anyone's datamodule
    return tokenizer if callable(getattr(tokenizer, "save_pretrained", None)) else None


def _data_of(trainer: pl.Trainer) -> str | None:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]  # public, set outside of the class
    if datamodule is None:
        return None
    own = vars(datamodule).keys() - vars(pl.LightningDataModule()).keys()
    settings = datamodule.hparams or {name: vars(datamodule)[name] for name in sorted(own) if not name.startswith("_")}
    described = ", ".join(f"{name}={value!r}" for name, value in settings.items() if _is_plain(value))
    return f"{type(datamodule).__name__}({described})"


def _hyperparameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    optimizers = trainer.optimizers
    group = optimizers[0].param_groups[0] if optimizers else {}
    known = {
        "optimizer": type(optimizers[0]).__name__ if optimizers else None,
        "learning_rate": group.get("initial_lr", group.get("lr")),  # a scheduler keeps the rate it started from
        "weight_decay": group.get("weight_decay"),
    }
    hparams = {name: value for name, value in pl_module.hparams.items() if _is_plain(value)}
    changes = pl_module.setting_changes if isinstance(pl_module, KnowsChanges) else []
    changed = {
        f"{name}, up to step {change['step']}": was
        for change in changes
        for name, (was, _) in change["settings"].items()
    }
    return (
        {name: value for name, value in known.items() if _is_plain(value)}
        | hparams
        | changed
        | {
            "optimizer steps": trainer.global_step,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val or "none",
            "precision": trainer.precision,
            "processes": trainer.world_size,
            "lightning": pl.__version__,
            "torch": torch.__version__,
        }
    )


def _results(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics as they stand; without those about the run's machinery."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in metrics.items() if not name.startswith(("grad_norm/", "memory/"))}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
