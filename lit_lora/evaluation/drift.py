"""How far one model's outputs are from another's: what merging and quantizing change, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_lora.base.shards import device_of_model


class Drift(NamedTuple):
    """Differences over every token of a sample."""

    max_abs: float
    """Largest difference of a logit."""
    mean_abs: float
    """Mean difference of a logit."""
    kl: float
    """Kullback-Leibler divergence of the next-token distributions from the reference, mean per token, in nats."""
    top1: float
    """Share of tokens where both find the same token most likely."""
    num_tokens: int
    """Tokens compared."""

    def __str__(self) -> str:
        return (
            f"logits differ by {self.max_abs:.2g} at most, {self.mean_abs:.2g} on average; "
            f"KL {self.kl:.2g} nats/token; same top token in {self.top1:.1%} of {self.num_tokens}"
        )


@torch.no_grad()
def sample_logits(model: PreTrainedModel, sample: Sequence[list[int]]) -> list[Tensor]:
    """Logits at every token, ``(tokens, vocabulary)`` float32 on the CPU, one tensor a text.

    Args:
        model: a causal language model; its mode is evaluation for the time being.
        sample: token ids of each text.
    """
    training = model.training
    model.eval()
    try:
        return [
            model(input_ids=torch.tensor([ids], device=device_of_model(model)), use_cache=False).logits[0].float().cpu()
            for ids in sample
        ]
    finally:
        model.train(training)


def measure_drift(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Drift:
    """Compare two results of :func:`sample_logits` on the same sample.

    Raises:
        ValueError: if one of them holds NaN, or infinity where the other does not: their difference is no number.
    """
    max_abs = sum_abs = kl = 0.0
    num_tokens = num_same = num_logits = 0
    for expected, got in zip(reference, other, strict=True):
        expected, got = _finite(expected, got)
        difference = (expected - got).abs()
        max_abs = max(max_abs, difference.max().item())
        sum_abs += difference.sum(dtype=torch.float64).item()
        log_p, log_q = F.log_softmax(expected.double(), -1), F.log_softmax(got.double(), -1)
        kl += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        num_same += int((expected.argmax(-1) == got.argmax(-1)).sum())
        num_tokens += len(expected)
        num_logits += expected.numel()
    return Drift(max_abs, sum_abs / num_logits, kl / num_tokens, num_same / num_tokens, num_tokens)


def _finite(expected: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Both without what a model masks in its vocabulary, which is minus infinity in both."""
    masked = expected.isneginf() & got.isneginf()
    for name, logits in (("reference", expected), ("other", got)):
        if not (logits.isfinite() | masked).all() or masked.all(dim=-1).any():
            raise ValueError(f"the logits of the {name} hold NaN or infinity: there is no drift to measure")
    lowest = torch.finfo(expected.dtype).min
    return expected.masked_fill(masked, lowest), got.masked_fill(masked, lowest)
