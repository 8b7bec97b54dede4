"""A LightningModule whose loss is a mean over supervised targets, whatever micro-batches and ranks a step is made of.

The loss of an optimizer step is the sum over its supervised tokens divided by their number, over all micro-batches and
all ranks, so that four batches of one equal one batch of four however long the examples are. Lightning divides by the
number of micro-batches instead; :meth:`TokenLossModule.optimizer_step` puts that right before anyone reads the
gradients. Where tokens have weights, it is the sum of weight times loss divided by the sum of the weights, likewise
over the whole step: weights are relative to each other, and the same weight for all changes nothing.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
from torch import Tensor, nn

from lit_lora.metrics import TrainingMetrics
from lit_lora.training.metrics_record import MetricsRecord
from lit_lora.training.optimizer_trial import EVALUATED_AGAIN
from lit_lora.training.step_metrics import EvaluationMeans, LossOutput, StepRecorder
from lit_lora.training.training_point import TrainingPoint

LOGGED = ("train_loss", "train_targets", "val_loss", "val_perplexity", "val_token_accuracy")
"""Metrics of a fit."""

_LOSS_DIVISOR = 1024.0  # any constant does: it keeps a summed loss in range for fp16 and is taken out again


@runtime_checkable
class KnowsSources(Protocol):
    """A data module whose evaluation batches say which source they are from: ``SFTDataModule``."""

    def source_names(self, stage: str) -> list[str]:
        """Of the sources, in the order that a batch's ``source`` counts."""
        ...


class TokenLossModule(L.LightningModule):
    """Steps and evaluations whose loss is a mean over targets, and their record."""

    def __init__(self) -> None:
        super().__init__()
        self._recorder = StepRecorder()
        self._means = EvaluationMeans()
        self._point = TrainingPoint()

    @abstractmethod
    def compute_loss(self, batch: Any, *, accuracy: bool = False) -> LossOutput:
        """Loss of one micro-batch, summed over its targets.

        Args:
            batch: what the dataloader gives.
            accuracy: also count correct predictions (validation and test).
        """

    @abstractmethod
    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name, in the order in which the optimizer holds them."""

    # ------------------------------------------------------------------ training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, up to a constant factor; see :meth:`optimizer_step`."""
        self._point.enter()
        output = self.compute_loss(batch)
        self._recorder.window.add(output)
        return output.loss_sum / _LOSS_DIVISOR

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One optimizer step on gradients that are normalised by the supervised tokens of the whole step.

        After the closure's backward pass a gradient is ``sum over micro-batches and ranks of nll_sum / (C * N * W)``
        for the constant C, N micro-batches and W ranks, so it is multiplied by ``C * N * W / supervised tokens``
        (or the weight of these tokens).
        That happens before callbacks see, clip or log gradients, and before a loss scaler unscales them.
        """
        evaluations = itertools.count()

        def closure() -> Any:
            if next(evaluations):
                raise RuntimeError(EVALUATED_AGAIN.format(type(self.trainer.optimizers[0]).__name__, "again"))
            loss = optimizer_closure()
            self._normalise_gradients()
            return loss

        with self._point.held():
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.finish_step(optimizer)

    def on_after_backward(self) -> None:
        """Leave the training point, between the micro-batches of a step too: whatever comes may evaluate or save."""
        self._point.leave()

    def _normalise_gradients(self) -> None:
        self._recorder.reduce(self.device, self._sum_over_ranks)
        factor = _LOSS_DIVISOR * self.trainer.accumulate_grad_batches * self.trainer.world_size
        gradients = [p.grad for p in self._optimized() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, (factor / self._recorder.divisor).to(gradients[0].dtype))

    def _optimized(self) -> list[Tensor]:
        # Not by a walk over all modules, twice a step: for a small model on a GPU that is a tenth of the host's work.
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return torch.as_tensor(self.trainer.strategy.reduce(values, reduce_op="sum"))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Take the norms of the unclipped gradients and of the parameters, and log the step's loss."""
        parameters = self._optimized()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._recorder.measure(gradients, [p.detach() for p in parameters], self.device)
        if self.trainer.barebones:  # which has no place to log to
            return
        # Not for Lightning's progress bars: for those it reads the value from the device in every step.
        self.log("train_loss", self._recorder.loss, rank_zero_only=True)
        # 0 where callbacks have dropped the gradients, as of a step that is not finite: nothing was learned from it.
        self.log("train_targets", self._recorder.num_targets * bool(gradients), rank_zero_only=True)

    def finish_step(self, optimizer: Any) -> None:
        """Record the step that was taken."""
        scaler, one = getattr(self.trainer.precision_plugin, "scaler", None), torch.ones((), device=self.device)
        self._recorder.finish(
            step=self.trainer.global_step + 1,
            loss_scale=scaler.scale(one) if scaler is not None else one,  # get_scale() waits for the device
            learning_rate=optimizer.param_groups[0]["lr"],
        )
        # Reading a value makes the host wait for a CUDA device, so there it is done on logging steps only.
        if self.device.type == "cpu" or self._recorder.num_pending >= self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.flush_metrics()

    @property
    def training_metrics(self) -> TrainingMetrics:
        """The record of the run up to the last :meth:`flush_metrics`."""
        return self._recorder.metrics

    def flush_metrics(self) -> TrainingMetrics:
        """Bring ``training_metrics`` up to the last step, and return it. Waits for the device."""
        return self._recorder.flush()

    def save_metrics(self) -> None:
        """Bring the file of the record, where there is one, up to the last step. Waits for the device."""
        self._recorder.save()

    @property
    def metrics_record(self) -> MetricsRecord:
        """Where ``training_metrics`` are kept."""
        return self._recorder.record

    # ------------------------------------------------------------------ validation and test

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the means of loss and accuracy."""
        self._means.add(self.compute_loss(batch, accuracy=True), _source(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the means of loss and accuracy."""
        self._means.add(self.compute_loss(batch, accuracy=True), _source(batch))

    def on_validation_epoch_start(self) -> None:
        """Start new means."""
        self._means = EvaluationMeans(self._source_names("validate")).to(self.device)

    def on_test_epoch_start(self) -> None:
        """Start new means."""
        self._means = EvaluationMeans(self._source_names("test")).to(self.device)

    def _source_names(self, stage: str) -> list[str]:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # public, set outside of the class
        return data.source_names(stage) if isinstance(data, KnowsSources) else []

    def on_validation_epoch_end(self) -> None:
        """Log ``val_loss`` (nats per token; ``val_loss/NAME`` for each of several sources), ``val_perplexity`` and
        ``val_token_accuracy``."""
        results = self._finish_evaluation("val")
        at_start = self.trainer.num_sanity_val_steps == math.inf and self.trainer.global_step == 0
        whole = not self.trainer.sanity_checking or at_start
        if whole and results:
            self.flush_metrics().validation.append({"step": self.trainer.global_step, **results})
        self._recorder.start_clock()

    def on_test_epoch_end(self) -> None:
        """Log ``test_loss``, ``test_perplexity`` and ``test_token_accuracy``."""
        self._finish_evaluation("test")

    def _finish_evaluation(self, prefix: str) -> dict[str, float]:
        results = self._means.results(prefix)
        if not self.trainer.barebones:
            self.log_dict(results, prog_bar=True, rank_zero_only=True)
        return {name: value.item() for name, value in results.items()}


def _source(batch: Any) -> int:
    return int(batch.get("source", 0)) if isinstance(batch, Mapping) else 0
