"""Cross-entropy of a linear output head, without ever holding the logits of all tokens.

A language model's logits are its largest activation: tokens times vocabulary, several copies of it in float32. Here
they exist for ``chunk_size`` tokens at a time, in one reused buffer, and the gradient of the hidden states is made in
the forward pass, while the chunk's softmax is at hand. A frozen head, the usual one under LoRA, needs no gradient.
Left out: label smoothing, z-loss, class weights.

Shapes: T tokens, D hidden, V vocab, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100


class LinearCrossEntropyOutput(NamedTuple):
    """What one pass over the supervised tokens gives."""

    nll_sum: Tensor
    """Sum of the negative log-likelihoods, float32 scalar, in nats."""
    num_correct: Tensor | None
    """How many tokens had the highest logit of all, int64 scalar; None where it was not asked for."""


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What :func:`linear_cross_entropy` computes, written plainly."""
    logits_TV = (hidden @ weight.T).float()
    return F.cross_entropy(logits_TV, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int = 512) -> Tensor:
    """Cross-entropy of a linear head, without the full logits.

    Equals ``F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")``; peak memory O(chunk_size * V).

    Args:
        hidden: final hidden states, ``(T, D)``, any float dtype.
        weight: output head, ``(V, D)``; gets a gradient if it requires one.
        labels: token to predict at each position, ``(T,)``; -100 is ignored.
        chunk_size: rows per chunk, in tokens.

    Returns:
        Sum over supervised tokens, float32 scalar.

    Raises:
        ValueError: if ``hidden`` and ``labels`` disagree on T.
    """
    return linear_cross_entropy_with_accuracy(hidden, weight, labels, chunk_size=chunk_size, accuracy=False).nll_sum


def linear_cross_entropy_with_accuracy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_size: int = 512, accuracy: bool = True
) -> LinearCrossEntropyOutput:
    """:func:`linear_cross_entropy`, and how many tokens the head got right."""
    if hidden.ndim != 2 or labels.ndim != 1 or len(hidden) != len(labels):
        raise ValueError(
            f"expected hidden (T, D) and labels (T,), got {tuple(hidden.shape)} and {tuple(labels.shape)}: "
            "select the supervised positions of both alike"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    nll_sum, num_correct = _LinearCrossEntropy.apply(hidden, weight.to(hidden.dtype), labels, chunk_size, accuracy)
    return LinearCrossEntropyOutput(nll_sum, num_correct if accuracy else None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_size: int, accuracy: bool
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        num_tokens, vocab_size = len(hidden_TD), len(weight_VD)
        nll_sum = hidden_TD.new_zeros((), dtype=torch.float32)
        num_correct = labels_T.new_zeros(())
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        buffer = hidden_TD.new_empty((min(chunk_size, num_tokens), vocab_size))

        for start in range(0, num_tokens, chunk_size):
            rows = slice(start, min(start + chunk_size, num_tokens))
            hidden_CD = hidden_TD[rows]
            labels_C = labels_T[rows]
            supervised_C = labels_C != IGNORE_INDEX
            labels_C = labels_C.clamp(min=0)
            logits_CV = torch.mm(hidden_CD, weight_VD.T, out=buffer[: len(labels_C)]).float()  # in place if float32
            max_C1, argmax_C1 = (
                logits_CV.max(dim=-1, keepdim=True) if accuracy else (logits_CV.amax(dim=-1, keepdim=True), None)
            )
            if argmax_C1 is not None:
                num_correct += ((argmax_C1.squeeze(-1) == labels_C) & supervised_C).sum()
            logits_CV.sub_(max_C1)
            label_logit_C = logits_CV.gather(-1, labels_C[:, None]).squeeze(-1)
            exp_CV = logits_CV.exp_()
            sum_C1 = exp_CV.sum(dim=-1, keepdim=True)
            nll_C = sum_C1.squeeze(-1).log() - label_logit_C
            nll_sum += (nll_C * supervised_C).sum()
            # d nll / d hidden = softmax @ W - W[label]; the softmax's division is left to the narrow side.
            if grad_hidden is not None:
                scale_C1 = supervised_C[:, None] / sum_C1
                product_CD = (exp_CV.to(weight_VD.dtype) @ weight_VD).float()
                target_CD = F.embedding(labels_C, weight_VD).float() * supervised_C[:, None]
                grad_hidden[rows] = (product_CD * scale_C1 - target_CD).to(grad_hidden.dtype)
            if grad_weight is not None:
                dlogits_CV = exp_CV.mul_(supervised_C[:, None] / sum_C1)
                dlogits_CV.scatter_add_(-1, labels_C[:, None], -supervised_C[:, None].to(dlogits_CV.dtype))
                grad_weight.addmm_(dlogits_CV.T, hidden_CD.float())

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(num_correct)
        return nll_sum, num_correct

    @staticmethod
    def backward(ctx: Any, grad_nll_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_nll_sum.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_nll_sum).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
