"""What an optimizer step measured: summed over micro-batches and ranks, kept on the device, read when that is free.

A value on a CUDA device makes the host wait when it is read, so finished steps stay there until a logging step, a
checkpoint or the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from lit_lora.metrics import StepMetrics, TrainingMetrics
from lit_lora.training.metrics_record import MetricsRecord


class LossOutput(NamedTuple):
    """The loss of one micro-batch, unnormalised."""

    loss_sum: Tensor
    """Sum over supervised targets (tokens, images, ...), scalar."""
    num_targets: int
    """How many targets that sum is over, in this micro-batch on this rank."""
    num_correct: Tensor | None = None
    """How many of them were predicted right; None if not counted."""
    num_tokens: int | None = None
    """Real (unpadded) tokens in the micro-batch; the number of targets if None."""
    target_weight: Tensor | None = None
    """Sum of the targets' weights, scalar, where the loss counts each target times a weight; their number if None."""


class StepWindow:
    """Sums over the micro-batches of one optimizer step, on this rank."""

    def __init__(self) -> None:
        self.loss_sum: Tensor | float = 0.0
        self.num_targets = 0
        self.num_tokens = 0
        self.num_batches = 0
        self.target_weight: Tensor | float = 0.0

    def add(self, output: LossOutput) -> None:
        """Add a micro-batch."""
        self.loss_sum = self.loss_sum + output.loss_sum.detach().float()
        self.num_targets += output.num_targets
        self.num_tokens += output.num_targets if output.num_tokens is None else output.num_tokens
        self.num_batches += 1
        weight = output.num_targets if output.target_weight is None else output.target_weight.detach().double()
        self.target_weight = self.target_weight + weight

    def totals(self, device: torch.device) -> Tensor:
        """Loss sum, targets, tokens and the targets' weight, ``(4,)`` float64."""
        weight = self.target_weight
        counts = [self.num_targets, self.num_tokens, 0.0 if isinstance(weight, Tensor) else weight]
        loss_sum = torch.as_tensor(self.loss_sum, dtype=torch.float64, device=device)
        counted = torch.tensor(counts, dtype=torch.float64).to(device, non_blocking=True)
        if isinstance(weight, Tensor):  # on the device, where it is not to be waited for
            counted[2] = weight
        return torch.cat([loss_sum.reshape(1), counted])

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return {**vars(self), "loss_sum": float(self.loss_sum), "target_weight": float(self.target_weight)}

    def add_state(self, state: dict[str, Any]) -> None:
        """Add the sums of a saved window; those of several ranks may follow one another."""
        for name, value in {"target_weight": state["num_targets"], **state}.items():  # older ones have no weights
            setattr(self, name, getattr(self, name) + value)


class StepRecorder:
    """Turns finished windows into the :class:`TrainingMetrics` of the run."""

    def __init__(self) -> None:
        self.record = MetricsRecord()
        self.window = StepWindow()
        self.totals: Tensor | None = None
        """Of the step being taken, over all ranks: loss sum, targets, tokens, the targets' weight; ``(4,)`` float64."""
        self._norms: Tensor | None = None
        self._pending: list[tuple[dict[str, Any], Tensor]] = []
        self._ended_s: float | None = None

    def start_clock(self) -> None:
        """What came before (loading, validation) is no step's time."""
        self._ended_s = time.perf_counter()

    def reduce(self, device: torch.device, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum the window over all ranks, and keep that for :meth:`finish`."""
        self.totals = sum_over_ranks(self.window.totals(device))
        return self.totals

    @property
    def loss(self) -> Tensor:
        """Mean loss per target of the step that is being taken, on the device; 0 where there are none."""
        assert self.totals is not None, "reduce comes first"
        return (self.totals[0] / self.divisor).float()

    @property
    def divisor(self) -> Tensor:
        """What a sum over the step is divided by for its mean: the weight of its targets, or 1 where it has none."""
        assert self.totals is not None, "reduce comes first"
        return self.totals[3].where(self.totals[3] > 0, 1.0)

    @property
    def num_targets(self) -> Tensor:
        """Targets of the step that is being taken, over all ranks, on the device."""
        assert self.totals is not None, "reduce comes first"
        return self.totals[1].float()

    def measure(self, gradients: list[Tensor], parameters: list[Tensor], device: torch.device) -> None:
        """Take the norms of gradients and parameters as they are now."""
        self._norms = torch.stack([_norm(gradients, device), _norm(parameters, device)])

    def finish(self, *, step: int, loss_scale: Tensor, learning_rate: float) -> None:
        """Close the window as optimizer step number ``step``; the scale of its loss is a scalar on the device."""
        assert self._norms is not None, "measure comes first"
        assert self.totals is not None, "reduce comes first"
        now = time.perf_counter()
        known = {
            "step": step,
            "learning_rate": learning_rate,
            "step_time_s": now - self._ended_s if self._ended_s is not None else 0.0,
        }
        self._pending.append((known, torch.cat([self.totals, self._norms.double(), loss_scale.double().reshape(1)])))
        self._ended_s = now
        self.window = StepWindow()

    @property
    def metrics(self) -> TrainingMetrics:
        """The record of the run up to the last :meth:`flush`."""
        return self.record.metrics

    @property
    def num_pending(self) -> int:
        """Steps that are not in :attr:`metrics` yet."""
        return len(self._pending)

    def flush(self) -> TrainingMetrics:
        """Bring the metrics up to the last step, and return them. Waits for the device."""
        pending, self._pending = self._pending, []
        if pending:
            for (known, _), values in zip(pending, torch.stack([v for _, v in pending]).tolist(), strict=True):
                loss_sum, num_targets, num_tokens, weight, grad_norm, param_norm, loss_scale = values
                step = StepMetrics(
                    loss=loss_sum / weight if weight else math.nan,
                    grad_norm=grad_norm,
                    param_norm=param_norm,
                    loss_scale=loss_scale,
                    num_tokens=int(num_tokens),
                    num_target_tokens=int(num_targets),
                    **known,
                )
                self.metrics.steps.append(step)
        return self.metrics

    def save(self) -> None:
        """Bring the record, and its file where there is one, up to the last step. Waits for the device."""
        self.flush()
        self.record.save()

    def state_dict(self) -> dict[str, Any]:
        """Of the record, up to the last step. Waits for the device."""
        self.flush()
        return self.record.state_dict()


class EvaluationMeans(nn.Module):
    """Means over an evaluation, each weighted by targets: loss and token accuracy, over all ranks.

    Args:
        sources: names of the data's sources, each of which has a mean loss of its own; not of a single one.
    """

    def __init__(self, sources: Sequence[str] = ()) -> None:
        super().__init__()
        self.loss = MeanMetric()
        self.token_accuracy = MeanMetric()
        self.num_targets = SumMetric()
        self.sources = list(sources) if len(sources) > 1 else []
        self._losses = [MeanMetric() for _ in self.sources]
        self.losses = nn.ModuleList(self._losses)  # for `to`
        for loss in self._losses:  # a rank may have no batch of a source, and takes part in its mean all the same
            loss.update(0.0, weight=0.0)

    def add(self, output: LossOutput, source: int = 0) -> None:
        """Add a batch of a source; one without targets changes nothing.

        It counts as an update all the same: a rank that had nothing but fillers takes part in :meth:`results`, for
        which the others wait.
        """
        targets = max(1, output.num_targets)
        weight: Any = output.num_targets
        divisor: Any = targets
        if output.target_weight is not None:
            weight = output.target_weight.detach()
            divisor = weight.where(weight > 0, 1.0)
        mean = output.loss_sum.detach() / divisor
        self.num_targets.update(output.num_targets)
        self.loss.update(mean, weight=weight)
        if self.sources:
            self._losses[source].update(mean, weight=weight)
        if output.num_correct is not None:
            self.token_accuracy.update(output.num_correct / targets, weight=output.num_targets)

    def results(self, prefix: str) -> dict[str, Tensor]:
        """``<prefix>_loss`` (nats per token), ``<prefix>_perplexity``, ``<prefix>_token_accuracy`` where counted.

        Of several sources also ``<prefix>_loss/<name>`` for each that was looked at.
        """
        if not self.num_targets.update_called or not self.num_targets.compute():
            return {}
        means = {"loss": self.loss, "token_accuracy": self.token_accuracy}
        results = {f"{prefix}_{name}": mean.compute() for name, mean in means.items() if mean.update_called}
        if f"{prefix}_loss" in results:
            results[f"{prefix}_perplexity"] = results[f"{prefix}_loss"].exp()
        for name, loss in zip(self.sources, self._losses, strict=True):
            if (mean := loss.compute()).isfinite():  # 0 of 0 targets is no number; one that is none shows in the whole
                results[f"{prefix}_loss/{name}"] = mean
        return results


def _norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(tensors)]))
