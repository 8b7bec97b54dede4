"""GradientNormLogger: gradient norms, and a stop at the first loss or gradient that is not finite.

Norms are taken in ``on_before_optimizer_step``: unscaled, over the whole accumulation window, before clipping. One
fused pass over the gradients a step gives a norm per parameter; sums per layer are made on logging steps only.

Cost of the check for finite numbers: on a CPU nothing. On CUDA reading a flag would make the CPU wait for the GPU, so
flags stay on the device and are read together on logging steps, before every checkpoint and at the end: a run stops up
to ``log_every_n_steps`` steps late, still names the step it happened in, and never writes a checkpoint in between.
``on_non_finite="skip"`` has to know before the update, so it waits for the device once an optimizer step.

Left out: sharded gradients (FSDP), whose local norms would be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_lora.callbacks._support.names import adapter_half, layer_group, listed
from lit_lora.callbacks._support.norms import any_not_finite, gradient_norms
from lit_lora.callbacks._support.spikes import MIN_HISTORY, SpikeWatch
from lit_lora.callbacks._support.step_loss import StepLoss
from lit_lora.callbacks._support.trainer import (
    KnowsSourceLines,
    is_logging_step,
    is_reading_step,
    log_details,
    log_metrics,
    state_key,
    write_json,
)
from lit_lora.callbacks.verdict import Check, NotProvedError, Verdict


class NonFiniteError(NotProvedError):
    """A loss or a gradient became NaN or infinite, or the fp16 loss scale collapsed."""


@dataclass
class _Step:
    """One optimizer step, on the device until it is read."""

    step: int
    names: list[str]
    norms: Tensor
    """Norm per parameter, ``(P,)``."""
    total: Tensor
    losses: list[Tensor]
    example_ids: list[Tensor]


class GradientNormLogger(Check):
    """Logs gradient norms and stops, or skips the step, at the first loss or gradient that is not finite.

    The failing or skipped step is written to ``<default_root_dir>/non_finite_step_<n>.json``: parameters, losses, and,
    where batches are dicts with ``example_ids``, the ids of all examples of the step, for replay (with their lines in
    the source where the data module has a method ``source_lines``). Loss spikes and gradient explosions are reported as
    warnings with their step.

    Under fp16 mixed precision an overflow is how the loss scale finds its level: such steps are counted, not an error,
    until the scale falls below ``min_loss_scale``.

    Logged on logging steps (unitless L2 norms before clipping, and counts):

    - ``grad_norm/total``, ``grad_norm/A``, ``grad_norm/B``: all parameters of the optimizer; each half of the adapters.
    - ``grad_norm/<layer>``: per numbered layer (``grad_norm/layers.3``), else per module; to the loggers only.
    - ``grad_norm/loss_scale``: under fp16 mixed precision.
    - ``grad_norm/non_finite_steps``, ``grad_norm/loss_spikes``, ``grad_norm/explosions``: counts, once there are any.

    Args:
        per_layer: also log one norm per layer.
        on_non_finite: "stop" raises :class:`NonFiniteError`; "skip" drops the gradients of the step, so that neither
            momentum nor weight decay moves anything.
        max_skips: steps that "skip" may drop in a run before it stops.
        monitor: logged metric to watch for spikes; the returned loss where there is no such metric.
        window: optimizer steps that spikes and explosions are measured against.
        spike_std: standard deviations above the window's mean at which a loss is a spike.
        explosion_factor: multiple of the window's median at which a norm above the first steps' is an explosion.
        min_loss_scale: smallest fp16 loss scale that is not an underflow.
    """

    name = "gradients"
    key = "gradient_norm"
    without_effect = frozenset({"per_layer"})

    def __init__(
        self,
        *,
        per_layer: bool = True,
        on_non_finite: Literal["stop", "skip"] = "stop",
        max_skips: int = 10,
        monitor: str | None = "train_loss",
        window: int = 100,
        spike_std: float = 6.0,
        explosion_factor: float = 10.0,
        min_loss_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if on_non_finite not in ("stop", "skip"):
            raise ValueError(f"on_non_finite must be 'stop' or 'skip', got {on_non_finite!r}")
        if max_skips < 1:
            raise ValueError(f"max_skips must be at least 1, got {max_skips}; on_non_finite stop allows none")
        if window < MIN_HISTORY:
            raise ValueError(f"window must be at least {MIN_HISTORY} steps, got {window}")
        if spike_std <= 0:
            raise ValueError(f"spike_std must be above 0, got {spike_std}")
        if explosion_factor <= 1:
            raise ValueError(f"explosion_factor must be above 1, got {explosion_factor}")
        if min_loss_scale <= 0:
            raise ValueError(f"min_loss_scale must be above 0, got {min_loss_scale}")
        self.per_layer = per_layer
        self.on_non_finite = on_non_finite
        self.max_skips = max_skips
        self.min_loss_scale = min_loss_scale
        self.num_non_finite = 0
        """Optimizer steps dropped, by "skip" or by the fp16 loss scale."""
        self.spikes = SpikeWatch(window, spike_std, explosion_factor)
        self._step_loss = StepLoss(monitor)
        self._names: dict[int, str] = {}
        self._pending: list[_Step] = []
        self._losses: list[Tensor] = []
        self._example_ids: list[Tensor] = []

    @property
    def state_key(self) -> str:
        """Names what is watched; how it is judged may change when a run is resumed."""
        return state_key(self, monitor=self._step_loss.monitor)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a run with nothing pending."""
        self._names = {}
        self._clear()
        self._step_loss.start(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        """Remember which examples the step is made of."""
        ids = batch.get("example_ids") if isinstance(batch, dict) else None
        if isinstance(ids, Tensor):
            self._example_ids.append(ids.detach())

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the loss for the check. With a loss scale it is not yet the loss: see ``on_train_batch_end``."""
        if _scaler(trainer) is None:
            self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure, check and log this step's gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        step = trainer.global_step + 1
        names = self._names_of(pl_module, parameters)
        norms = gradient_norms([p.grad for p in parameters if p.grad is not None], 2.0)
        scaler = _scaler(trainer)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer unscales in its own step, after this hook. get_scale() would wait for the device.
            norms = norms / scaler.scale(torch.ones((), device=norms.device))
        total = torch.linalg.vector_norm(norms)
        record = _Step(step, names, norms, total, list(self._losses), list(self._example_ids))
        self._pending.append(record)
        if scaler is None and (
            self.on_non_finite == "skip" or _free_to_read(norms.device) or is_reading_step(trainer, step)
        ):
            self._read(trainer, optimizer)
        if is_logging_step(trainer, step):
            self._log(trainer, pl_module, record)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Watch the loss, and under fp16 mixed precision the loss scale."""
        scaler = _scaler(trainer)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if scaler is not None and isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if not self._step_loss.update(trainer, outputs):
            return
        step = trainer.global_step
        reading = is_reading_step(trainer, step) or _free_to_read(pl_module.device)
        if scaler is not None and self._pending:
            self._pending[-1].losses = list(self._losses)
            if reading:
                self._read_scaled(trainer, float(scaler.get_scale()))
        self._losses.clear()
        self._example_ids.clear()
        if reading:
            self._watch_losses()
        if is_logging_step(trainer, step):
            counts = {
                "grad_norm/non_finite_steps": self.num_non_finite,
                "grad_norm/loss_spikes": self.spikes.num_spikes,
                "grad_norm/explosions": self.spikes.num_explosions,
            }
            values = {key: float(count) for key, count in counts.items() if count}
            if scaler is not None:
                values["grad_norm/loss_scale"] = float(scaler.get_scale())
            log_metrics(trainer, pl_module, values)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Let no checkpoint be written of weights that a non-finite step has spoilt."""
        self._read_all(trainer)

    def judge(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Verdict:
        """Read what is still pending, and sum up."""
        self._read_all(trainer)
        if not self.spikes.max_norm_step:
            return Verdict(self.name, None, f"{trainer.global_step} steps, none with a finite gradient to measure")
        dropped = f", {self.num_non_finite} dropped as not finite" if self.num_non_finite else ""
        return Verdict(
            self.name,
            True,
            f"{trainer.global_step} steps{dropped}; largest norm {self.spikes.max_norm:.4g} at step "
            f"{self.spikes.max_norm_step}; {self.spikes.num_spikes} loss spikes, {self.spikes.num_explosions} gradient "
            "explosions",
        )

    def judge_early(self, trainer: pl.Trainer, exception: BaseException) -> Verdict:
        """No answer; and let go of the batch."""
        self._clear()
        return Verdict(self.name, None, f"ended early after step {trainer.global_step}")

    def state_dict(self) -> dict[str, Any]:
        """Windows and counts as plain types."""
        return {
            "spikes": self.spikes.state_dict(),
            "num_non_finite": self.num_non_finite,
            "source": self._step_loss.source,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; what an older state lacks starts empty."""
        self.spikes.load_state_dict(state_dict.get("spikes", {}))
        self.num_non_finite = state_dict.get("num_non_finite", 0)
        self._step_loss.source = state_dict.get("source")

    def _names_of(self, pl_module: pl.LightningModule, parameters: list[torch.nn.Parameter]) -> list[str]:
        if any(id(p) not in self._names for p in parameters):
            self._names = {id(p): name for name, p in pl_module.named_parameters()}
        return [self._names.get(id(p), f"parameter {i} of the optimizer") for i, p in enumerate(parameters)]

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: _Step) -> None:
        halves: dict[str, list[int]] = {}
        layers: dict[str, list[int]] = {}
        for index, name in enumerate(record.names):
            half = adapter_half(name)
            if half is not None:
                halves.setdefault(f"grad_norm/{half}", []).append(index)
            if self.per_layer:
                layers.setdefault(f"grad_norm/{layer_group(name)}", []).append(index)
        values = {key: torch.linalg.vector_norm(record.norms[indices]) for key, indices in halves.items()}
        log_metrics(trainer, pl_module, {"grad_norm/total": record.total, **values})
        if layers and trainer.loggers:
            norms = record.norms.tolist()  # waits for the device; logging steps only
            log_details(trainer, record.step, {k: math.hypot(*(norms[i] for i in idx)) for k, idx in layers.items()})

    def _read_all(self, trainer: pl.Trainer) -> None:
        scaler = _scaler(trainer)
        if scaler is None:
            self._read(trainer, None)
        else:
            self._read_scaled(trainer, float(scaler.get_scale()))
        self._watch_losses()

    def _read(self, trainer: pl.Trainer, optimizer: Optimizer | None) -> None:
        """Check the pending steps; the last of them has not updated anything yet if its optimizer is given."""
        for record, total, bad_gradient, bad_loss in self._take(trainer):
            if not (bad_gradient or bad_loss):
                self.spikes.add_norm(record.step, total)
                continue
            self.num_non_finite += 1
            if self.on_non_finite == "stop" or optimizer is None or self.num_non_finite > self.max_skips:
                skipped = f" ({self.num_non_finite - 1} steps were skipped before)" if self.num_non_finite > 1 else ""
                self._stop(trainer, record, self._reason(record) + skipped)
            self._skip(trainer, record, "on_non_finite='skip'")
            optimizer.zero_grad(set_to_none=True)

    def _read_scaled(self, trainer: pl.Trainer, scale: float) -> None:
        for record, total, bad_gradient, bad_loss in self._take(trainer):
            if bad_loss:
                self.num_non_finite += 1
                if self.on_non_finite == "stop" or self.num_non_finite > self.max_skips:
                    self._stop(trainer, record, self._reason(record))
                self._skip(trainer, record, "the loss scale")
            elif bad_gradient:
                self.num_non_finite += 1
                if scale < self.min_loss_scale:
                    self._stop(
                        trainer,
                        record,
                        f"the fp16 loss scale fell to {scale:g}, below min_loss_scale={self.min_loss_scale:g}, after "
                        f"{self.num_non_finite} overflows; train in bf16-mixed, or lower the learning rate",
                    )
            else:
                self.spikes.add_norm(record.step, total)

    def _take(self, trainer: pl.Trainer) -> list[tuple[_Step, float, bool, bool]]:
        """The pending steps with their norms, and whether a gradient or a loss was not finite on any rank."""
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        totals = torch.stack([record.total.float() for record in pending])
        losses = [any_not_finite(record.losses, totals.device) for record in pending]
        bad = torch.stack([~torch.isfinite(totals), torch.stack(losses)]).float()
        if trainer.world_size > 1:  # so that all ranks stop or skip together
            bad = torch.as_tensor(trainer.strategy.reduce(bad, reduce_op="sum"))
        values = torch.cat([totals[None], bad]).tolist()  # the one wait for the device
        return [(r, total, g > 0, loss > 0) for r, total, g, loss in zip(pending, *values, strict=True)]

    def _reason(self, record: _Step) -> str:
        losses = [float(loss) for loss in record.losses]
        finite = torch.isfinite(record.norms).tolist()
        names = [name for name, ok in zip(record.names, finite, strict=True) if not ok]
        if any(not torch.isfinite(loss) for loss in record.losses):
            what = f"the loss of step {record.step} is not finite ({losses})"
            return what + (f"; so are the gradients of {len(names)} parameters: {listed(names)}" if names else "")
        if not names:
            return f"a loss or gradient of step {record.step} is not finite on another rank, or the norm overflows"
        return f"the gradient of step {record.step} is not finite in {len(names)} parameters: {listed(names)}"

    def _stop(self, trainer: pl.Trainer, record: _Step, reason: str) -> NoReturn:
        where = self._write(trainer, record, reason)
        self.verdict = Verdict(self.name, False, reason)
        raise NonFiniteError(
            f"{reason}. {where}; look there for empty or extreme examples, then lower the learning rate, clip "
            "gradients, or set on_non_finite to skip"
        )

    def _skip(self, trainer: pl.Trainer, record: _Step, who: str) -> None:
        reason = self._reason(record)
        where = self._write(trainer, record, reason)
        rank_zero_warn(f"{who} skipped the update of step {record.step}: {reason}. {where}")

    def _write(self, trainer: pl.Trainer, record: _Step, reason: str) -> str:
        """Write the step down for replay; every rank must call it. Tells where it is."""
        ids = [batch.tolist() for batch in record.example_ids]
        gathered: list[Any] = [ids]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            gathered = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, ids)
        path = Path(trainer.default_root_dir) / f"non_finite_step_{record.step}.json"
        failure = ""
        if trainer.is_global_zero:
            content = {
                "step": record.step,
                "epoch": trainer.current_epoch,
                "reason": reason,
                "losses": [float(loss) for loss in record.losses],
                "grad_norms": dict(zip(record.names, record.norms.tolist(), strict=True)),
                "example_ids_by_rank_and_micro_batch": gathered,
            }
            data = trainer.datamodule  # type: ignore[attr-defined]  # public, set outside of the class
            if isinstance(data, KnowsSourceLines):
                content["source_lines_by_rank_and_micro_batch"] = [[*map(data.source_lines, rank)] for rank in gathered]
            try:
                write_json(path, content)
            except OSError as error:
                failure = f" (could not be written: {error})"
        known = [str(example) for rank in gathered for batch in rank for example in batch]
        examples = f"Its examples are {listed(known)}; all" if known else "Its losses"
        return f"{examples} and norms are in {path}{failure}"

    def _watch_losses(self) -> None:
        if self._step_loss.restarted:
            self.spikes.losses.clear()
            self._step_loss.restarted = False
        for step, loss in self._step_loss.drain():
            self.spikes.add_loss(step, loss)

    def _clear(self) -> None:
        self._pending.clear()
        self._losses.clear()
        self._example_ids.clear()


def _scaler(trainer: pl.Trainer) -> Any:
    """The fp16 gradient scaler of the precision plugin, where it has one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _free_to_read(device: torch.device) -> bool:
    """Whether reading a value makes nothing wait."""
    return device.type == "cpu"
