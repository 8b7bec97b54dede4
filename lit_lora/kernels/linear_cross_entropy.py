"""Cross-entropy of a linear output head, without ever holding the logits of all tokens.

A language model's logits are its largest activation: tokens times vocabulary, several copies of it in float32. Here
they exist for ``chunk_size`` tokens and some thousand rows of the head at a time, which a processor's cache can hold,
and are used up at once: for the running normaliser, and for the gradient of the hidden states, a running mean of the
head's rows weighted by their probability (the scheme of FlashAttention, arXiv:2205.14135, with the head as keys and
values). On CUDA, where a launch costs as much as many bytes, a frozen head comes as one block, and a chunk has as many
tokens as ``_CUDA_CHUNK_BYTES`` of logits allow. A frozen head, the usual one under LoRA, needs no gradient. Left out:
label smoothing, z-loss, class weights (tokens may have weights).

The label's logit stays out of the sums. With z the log of the others' summed exponentials less the label's logit, a
token's loss is softplus(z), and its gradient sigmoid(z) times the mean row of the others less the label's row: no
difference of nearly equal numbers where the model is sure.

Shapes: T tokens, D hidden, V vocab, C tokens of a chunk, N rows of a block of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora.kernels import products
from lit_lora.kernels.cuda_way import takes_cuda_way

IGNORE_INDEX = -100

_BLOCK_BYTES = 2**14
"""Of a row of logits that is there at a time."""

_CPU_CHUNK = 512
"""Tokens of a chunk on a CPU."""

_CUDA_CHUNK_BYTES = 2**27
"""Of the logits of a chunk on CUDA."""

_LOWEST, _SMALLEST = torch.finfo(torch.float32).min, 1e-30
"""In the place of minus infinity and zero, whose differences and quotients are no numbers."""


class LinearCrossEntropyOutput(NamedTuple):
    """What one pass over the supervised tokens gives."""

    nll_sum: Tensor
    """Sum of the negative log-likelihoods, float32 scalar, in nats."""
    num_correct: Tensor | None
    """How many tokens had the highest logit of all, int64 scalar; None where it was not asked for."""


class RowBlocks(Protocol):
    """A frozen head that is stored in another form, and never there as a whole."""

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight ``(V, D)`` in blocks of rows, from the first to the last."""

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these tokens."""


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """What :func:`linear_cross_entropy` computes, written plainly."""
    logits_TV = (hidden @ weight.T).float()
    return F.cross_entropy(logits_TV, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor | RowBlocks, labels: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """Cross-entropy of a linear head, without the full logits.

    Equals ``F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")``. Peak memory O(chunk_size), or
    O(chunk_size * V) if the head is trained.

    Args:
        hidden: final hidden states, ``(T, D)``, any float dtype.
        weight: output head, ``(V, D)``; gets a gradient if it requires one. Or a frozen one that comes in blocks.
        labels: token to predict at each position, ``(T,)``; -100 is ignored.
        chunk_size: rows per chunk, in tokens; by default what is fast on the device.

    Returns:
        Sum over supervised tokens, float32 scalar.

    Raises:
        ValueError: if ``hidden`` and ``labels`` disagree on T.
    """
    return linear_cross_entropy_with_accuracy(hidden, weight, labels, chunk_size=chunk_size, accuracy=False).nll_sum


def linear_cross_entropy_with_accuracy(
    hidden: Tensor,
    weight: Tensor | RowBlocks,
    labels: Tensor,
    *,
    chunk_size: int | None = None,
    accuracy: bool = True,
    weights: Tensor | None = None,
) -> LinearCrossEntropyOutput:
    """:func:`linear_cross_entropy`, and how many tokens the head got right.

    With ``weights``, ``(T,)``, each token's negative log-likelihood counts that much in the sum.
    """
    if hidden.ndim != 2 or labels.ndim != 1 or len(hidden) != len(labels):
        raise ValueError(
            f"expected hidden (T, D) and labels (T,), got {tuple(hidden.shape)} and {tuple(labels.shape)}: "
            "select the supervised positions of both alike"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    plain, blocks = (weight.to(hidden.dtype), None) if isinstance(weight, Tensor) else (None, weight)
    nll_sum, num_correct = _LinearCrossEntropy.apply(hidden, plain, blocks, labels, chunk_size, weights)
    return LinearCrossEntropyOutput(nll_sum, num_correct if accuracy else None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor | None,
        head: RowBlocks | None,
        labels_T: Tensor,
        chunk_size: int | None,
        weights_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype, vocab_size = hidden_TD.dtype, weight_VD.shape[0] if weight_VD is not None else 0
        on_cuda = takes_cuda_way(hidden_TD)
        block_size = _BLOCK_BYTES // dtype.itemsize
        if weight_VD is not None:  # a trained head as one block, whose normaliser is known when it is done
            block_size = vocab_size if needs_weight or on_cuda else block_size
            head = _PlainRows(weight_VD, block_size)
        if chunk_size is None:
            chunk_size = max(1, _CUDA_CHUNK_BYTES // 4 // block_size) if on_cuda else _CPU_CHUNK
        assert head is not None
        ctx.weight_dtype = dtype
        if on_cuda and weight_VD is not None and not needs_weight:
            nll_sum, num_correct, grad_hidden = _in_one_block(
                hidden_TD, weight_VD, labels_T, chunk_size, needs_hidden, weights_T
            )
            ctx.save_for_backward(grad_hidden, None)
            ctx.mark_non_differentiable(num_correct)
            return nll_sum, num_correct
        nll_sum = hidden_TD.new_zeros((), dtype=torch.float32)
        num_correct = labels_T.new_zeros(())
        grad_hidden = torch.empty_like(hidden_TD) if needs_hidden else None
        grad_weight = (
            hidden_TD.new_zeros((vocab_size, hidden_TD.shape[1]), dtype=torch.float32) if needs_weight else None
        )
        # On the wide side: for a trained head, or for half precision, whose range a CPU's products have.
        normalise = needs_weight or (dtype is not torch.float32 and not on_cuda)

        for start in range(0, len(hidden_TD), chunk_size):
            rows = slice(start, min(start + chunk_size, len(hidden_TD)))
            hidden_CD = hidden_TD[rows]
            supervised_C1 = (labels_T[rows] != IGNORE_INDEX)[:, None]
            counts_C1 = supervised_C1 if weights_T is None else supervised_C1 * weights_T[rows, None]
            labels_C1 = labels_T[rows, None].clamp(min=0)
            label_logit_C1 = hidden_TD.new_zeros(labels_C1.shape, dtype=torch.float32)
            # Of the tokens that are not the label: largest logit, log of the summed exponentials, mean row of the head.
            max_C1 = torch.full_like(label_logit_C1, float("-inf"))
            lse_C1 = torch.full_like(label_logit_C1, float("-inf"))
            mean_CD = torch.zeros_like(hidden_CD, dtype=torch.float32)
            first = 0
            for block_ND in head.blocks(dtype):
                logits_CN = products.matmul_float32(hidden_CD, block_ND.t())
                column_C1 = labels_C1 - first
                first += len(block_ND)
                here_C1 = (column_C1 >= 0) & (column_C1 < len(block_ND))
                column_C1 = column_C1.clamp(0, len(block_ND) - 1)
                at_column_C1 = logits_CN.gather(-1, column_C1)
                label_logit_C1 = torch.where(here_C1, at_column_C1, label_logit_C1)
                logits_CN.scatter_(-1, column_C1, at_column_C1.masked_fill(here_C1, float("-inf")))
                block_max_C1 = logits_CN.amax(dim=-1, keepdim=True).clamp_(
                    min=_LOWEST
                )  # a block may be the label alone
                exp_CN = logits_CN.sub_(block_max_C1).exp_()
                sum_C1 = exp_CN.sum(dim=-1, keepdim=True).clamp_(min=_SMALLEST)
                new_lse_C1 = torch.logaddexp(lse_C1, block_max_C1 + sum_C1.log())
                if needs_hidden:
                    share_C1 = (block_max_C1 - new_lse_C1).exp_()
                    if normalise:
                        exp_CN.div_(sum_C1)
                        share_C1.mul_(sum_C1)
                    product_CD = products.matmul_float32(exp_CN.to(dtype), block_ND)
                    mean_CD.mul_((lse_C1 - new_lse_C1).exp_()).addcmul_(product_CD, share_C1)
                max_C1, lse_C1 = torch.maximum(max_C1, block_max_C1), new_lse_C1
            z_C1 = lse_C1 - label_logit_C1
            nll_sum += (F.softplus(z_C1) * counts_C1).sum()
            num_correct += ((label_logit_C1 > max_C1) & supervised_C1).sum()
            weight_C1 = z_C1.sigmoid() * counts_C1
            if grad_hidden is not None:
                label_CD = head.rows(labels_C1.squeeze(-1), dtype)
                grad_hidden[rows] = mean_CD.sub_(label_CD).mul_(weight_C1).to(grad_hidden.dtype)
            if grad_weight is not None:
                dlogits_CV = (exp_CN if needs_hidden else exp_CN.div_(sum_C1)).mul_(weight_C1)
                grad_weight.addmm_(dlogits_CV.scatter_(-1, labels_C1, -weight_C1).T, hidden_CD.float())

        ctx.save_for_backward(grad_hidden, grad_weight)
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


def _in_one_block(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    chunk_size: int,
    needs_hidden: bool,
    weights_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same of a frozen head as a whole, in few launches; the sums over single tokens come once, at the end."""
    supervised_T1 = (labels_T != IGNORE_INDEX)[:, None]
    counts_T1 = supervised_T1 if weights_T is None else supervised_T1 * weights_T[:, None]
    labels_T1 = labels_T[:, None].clamp(min=0)
    label_logit_T1, max_T1, sum_T1 = hidden_TD.new_empty((3, *labels_T1.shape), dtype=torch.float32)
    mean_TD = torch.empty_like(hidden_TD, dtype=torch.float32) if needs_hidden else None
    for start in range(0, len(hidden_TD), chunk_size):
        rows = slice(start, start + chunk_size)
        logits_CV = products.matmul_float32(hidden_TD[rows], weight_VD.t())
        torch.gather(logits_CV, 1, labels_T1[rows], out=label_logit_T1[rows])
        logits_CV.scatter_(1, labels_T1[rows], float("-inf"))
        torch.amax(logits_CV, 1, keepdim=True, out=max_T1[rows])
        exp_CV = logits_CV.sub_(max_T1[rows].clamp_(min=_LOWEST)).exp_()
        torch.sum(exp_CV, 1, keepdim=True, out=sum_T1[rows])
        if mean_TD is not None:
            mean_TD[rows] = products.matmul_float32(exp_CV.to(hidden_TD.dtype), weight_VD)
        del logits_CV, exp_CV  # before the next ones are made
    sum_T1.clamp_(min=_SMALLEST)
    z_T1 = max_T1 + sum_T1.log() - label_logit_T1
    nll_sum = (F.softplus(z_T1) * counts_T1).sum()
    num_correct = ((label_logit_T1 > max_T1) & supervised_T1).sum()
    if mean_TD is not None:
        label_TD = F.embedding(labels_T1.squeeze(1), weight_VD)
        mean_TD.div_(sum_T1).sub_(label_TD).mul_(z_T1.sigmoid() * counts_T1)
        return nll_sum, num_correct, mean_TD.to(hidden_TD.dtype)
    return nll_sum, num_correct, None


class _PlainRows(NamedTuple):
    """A plain weight, in blocks of rows."""

    weight_VD: Tensor
    block_size: int

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        return iter(self.weight_VD.split(self.block_size))

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.weight_VD)
