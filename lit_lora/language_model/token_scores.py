"""What a model makes of each target token, over the whole vocabulary: its loss, and how far adapters have moved it.

The loss of training is a sum in chunks (``kernels/linear_cross_entropy.py``), which holds no logits. Here each token is
told apart, and distributions are compared, in float32 over all of the vocabulary; logits exist for a block of tokens at
a time where the head can be run apart, and for the batch where the model computes its own.

Shapes: S target tokens, V vocab, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_lora.adapters.merge import disable_lora
from lit_lora.base.shards import in_one_pass
from lit_lora.batch import Batch
from lit_lora.language_model.forward import ForwardPath, laid_out, target_hidden, target_logits

T = TypeVar("T")

_BLOCK_BYTES = 2**26
"""Of float32 logits that are there at a time."""


class TokenScores(NamedTuple):
    """Of each target token of a batch, in its order."""

    nll_S: Tensor
    """Negative log-likelihood in nats, float32."""
    correct_S: Tensor
    """Whether it is the most likely one."""


class TokenShift(NamedTuple):
    """What adapters change at each target token of a batch."""

    base_nll_S: Tensor
    """Negative log-likelihood without them, in nats, float32."""
    nll_S: Tensor
    """With them."""
    kl_S: Tensor
    """Kullback-Leibler divergence of the distribution with them from that without, in nats, float32."""


@torch.no_grad()
def token_scores(model: PreTrainedModel, batch: Batch, path: ForwardPath) -> TokenScores:
    """Loss of each target token, and whether it was predicted.

    Args:
        model: in evaluation mode.
        batch: with targets; their weights do not count here.
        path: from :func:`lit_lora.language_model.trial.choose_path`.
    """
    targets_S = batch["target_ids"]
    batch = laid_out(batch, path)

    def scored(logits_SV: Tensor, block: slice) -> tuple[Tensor, ...]:
        return _nll(logits_SV, targets_S[block]), logits_SV.argmax(-1) == targets_S[block]

    def run() -> list[Tensor]:
        output_S = _outputs(model, batch, path)
        return _by_block(model, len(targets_S), lambda block: scored(_logits(model, path, output_S[block]), block))

    return TokenScores(*_in_pass(model, path, run))


@torch.no_grad()
def token_shift(model: PreTrainedModel, batch: Batch, path: ForwardPath) -> TokenShift:
    """Compare the model with its adapters and without them.

    Args:
        model: in evaluation mode.
        batch: with targets; their weights do not count here.
        path: from :func:`lit_lora.language_model.trial.choose_path`.
    """
    targets_S = batch["target_ids"]
    batch = laid_out(batch, path)
    with disable_lora(model):
        base_S = _in_pass(model, path, lambda: _outputs(model, batch, path))

    def compared(base_SV: Tensor, own_SV: Tensor, block: slice) -> tuple[Tensor, ...]:
        log_p, log_q = F.log_softmax(base_SV, -1), F.log_softmax(own_SV, -1)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # what a model masks is impossible in both
        return _nll(base_SV, targets_S[block]), _nll(own_SV, targets_S[block]), kl

    def run() -> list[Tensor]:
        own_S = _outputs(model, batch, path)

        def of_block(block: slice) -> tuple[Tensor, ...]:
            # A head that is run apart has no adapter, so it is the same for both.
            return compared(_logits(model, path, base_S[block]), _logits(model, path, own_S[block]), block)

        return _by_block(model, len(targets_S), of_block)

    return TokenShift(*_in_pass(model, path, run))


def _in_pass(model: PreTrainedModel, path: ForwardPath, run: Callable[[], T]) -> T:
    """``run()``, where it calls parts of a sharded model and not the model itself, as within its forward pass."""
    return in_one_pass(model, run) if path.direct_head else run()


def _outputs(model: PreTrainedModel, batch: Batch, path: ForwardPath) -> Tensor:
    """What a block of logits is made of: hidden states ``(S, D)``, or the logits themselves."""
    return target_hidden(model, batch) if path.direct_head else target_logits(model, batch)


def _logits(model: PreTrainedModel, path: ForwardPath, output_S: Tensor) -> Tensor:
    return model.get_output_embeddings()(output_S).float() if path.direct_head else output_S


def _nll(logits_SV: Tensor, targets_S: Tensor) -> Tensor:
    return F.cross_entropy(logits_SV, targets_S, reduction="none")


def _by_block(model: PreTrainedModel, count: int, of_block: Callable[[slice], tuple[Tensor, ...]]) -> list[Tensor]:
    size = max(1, _BLOCK_BYTES // (4 * model.config.get_text_config().vocab_size))
    parts = [of_block(slice(start, start + size)) for start in range(0, max(count, 1), size)]
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]
