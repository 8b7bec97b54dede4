"""Cross-entropy of a linear output head, without ever holding the logits of all tokens.

A language model's logits are its largest activation: tokens times vocabulary, several copies of it in float32. Here
they exist for ``chunk_size`` tokens at a time, in one reused buffer, and the gradient of the hidden states is made in
the forward pass, while the chunk's softmax is at hand. A frozen head, the usual one under LoRA, needs no gradient.
Left out: label smoothing, z-loss, class weights.

Shapes: T tokens, D hidden, V vocab, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

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


class RowBlocks(Protocol):
    """A frozen head that is stored in another form, and never there as a whole."""

    @property
    def num_rows(self) -> int:
        """V."""

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight ``(V, D)`` in blocks of rows, from the first to the last."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these tokens."""


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What :func:`linear_cross_entropy` computes, written plainly."""
    logits_TV = (hidden @ weight.T).float()
    return F.cross_entropy(logits_TV, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | RowBlocks, labels: Tensor, *, chunk_size: int = 512
) -> Tensor:
    """Cross-entropy of a linear head, without the full logits.

    Equals ``F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")``; peak memory O(chunk_size * V).

    Args:
        hidden: final hidden states, ``(T, D)``, any float dtype.
        weight: output head, ``(V, D)``; gets a gradient if it requires one. Or a frozen one that comes in blocks.
        labels: token to predict at each position, ``(T,)``; -100 is ignored.
        chunk_size: rows per chunk, in tokens.

    Returns:
        Sum over supervised tokens, float32 scalar.

    Raises:
        ValueError: if ``hidden`` and ``labels`` disagree on T.
    """
    return linear_cross_entropy_with_accuracy(hidden, weight, labels, chunk_size=chunk_size, accuracy=False).nll_sum


def linear_cross_entropy_with_accuracy(
    hidden: Tensor, weight: Tensor | RowBlocks, labels: Tensor, *, chunk_size: int = 512, accuracy: bool = True
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
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    plain, blocks = (weight.to(hidden.dtype), None) if isinstance(weight, Tensor) else (None, weight)
    nll_sum, num_correct = _LinearCrossEntropy.apply(hidden, plain, blocks, labels, chunk_size, accuracy)
    return LinearCrossEntropyOutput(nll_sum, num_correct if accuracy else None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor | None,
        head: RowBlocks | None,
        labels_T: Tensor,
        chunk_size: int,
        accuracy: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        whole = _Whole(weight_VD) if weight_VD is not None else head
        assert whole is not None
        num_tokens, vocab_size, dtype = len(hidden_TD), whole.num_rows, hidden_TD.dtype
        nll_sum = hidden_TD.new_zeros((), dtype=torch.float32)
        num_correct = labels_T.new_zeros(())
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight = (
            hidden_TD.new_zeros((vocab_size, hidden_TD.shape[1]), dtype=torch.float32) if needs_weight else None
        )
        buffer = hidden_TD.new_empty((min(chunk_size, num_tokens), vocab_size))

        for start in range(0, num_tokens, chunk_size):
            rows = slice(start, min(start + chunk_size, num_tokens))
            hidden_CD = hidden_TD[rows]
            labels_C = labels_T[rows]
            supervised_C = labels_C != IGNORE_INDEX
            labels_C = labels_C.clamp(min=0)
            logits_CV = _product_(buffer[: len(labels_C)], hidden_CD, whole).float()  # in place if float32
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
            # d nll / d logits = softmax - onehot, here times the sum of exponentials; that is divided out on the narrow
            # side. The label's share is taken off before the product: afterwards it would cancel all but few digits.
            dlogits_CV = exp_CV.scatter_add_(-1, labels_C[:, None], -sum_C1)
            scale_C1 = supervised_C[:, None] / sum_C1
            if dtype != torch.float32 or grad_weight is not None:
                dlogits_CV.mul_(scale_C1)  # now, where the range of half precision or the wide side needs it
                scale_C1 = torch.ones_like(scale_C1)
            if grad_hidden is not None:
                product_CD = _transposed_product(dlogits_CV.to(dtype), whole).float()
                grad_hidden[rows] = (product_CD * scale_C1).to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(dlogits_CV.T, hidden_CD.float())

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = dtype
        ctx.mark_non_differentiable(num_correct)
        return nll_sum, num_correct

    @staticmethod
    def backward(ctx: Any, grad_nll_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_nll_sum.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_nll_sum).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


class _Whole(NamedTuple):
    """A plain weight as one block."""

    weight_VD: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.weight_VD)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        yield self.weight_VD

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight_VD)


def _product_(out_CV: Tensor, hidden_CD: Tensor, head: RowBlocks) -> Tensor:
    start = 0
    for block in head.blocks(hidden_CD.dtype):
        torch.mm(hidden_CD, block.T, out=out_CV[:, start : start + len(block)])
        start += len(block)
    return out_CV


def _transposed_product(grad_CV: Tensor, head: RowBlocks) -> Tensor:
    total, start = None, 0
    for block in head.blocks(grad_CV.dtype):
        part = grad_CV[:, start : start + len(block)] @ block
        total = part if total is None else total.add_(part)
        start += len(block)
    assert total is not None
    return total
