"""A frozen embedding and output head in 8 bits: int8 codes and one scale for each token's row.

With a vocabulary of 49152 the tied embedding of a 135M model weighs as much as all its 4-bit layers. Rows are rounded
to 255 levels, so a weight is off by at most 1/254 of the largest in its row. Plain torch: bitsandbytes is not needed.
A tied head shares codes and scales with the embedding. Nothing here ever holds more than ``BLOCK`` rows dequantized;
the training loss goes through the codes too (``kernels/linear_cross_entropy.py``).

Shapes: T tokens, V vocab, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.base.shards import made_of_rows

BLOCK = 4096
"""Rows of the head that are dequantized at a time."""


class Int8Rows(nn.Module):
    """The storage that embedding and head share: ``weight`` int8 ``(V, D)``, ``scales`` float32 ``(V,)``."""

    def __init__(self, weight: nn.Parameter, scales: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.scales = scales
        self.dtype = dtype

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of these tokens, dequantized, ``(..., D)``."""
        return dequantize_rows(self.weight[ids], self.scales[ids], dtype)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All rows, dequantized, a block at a time."""
        return _blocks(self.weight, self.scales, dtype)

    def extra_repr(self) -> str:
        """Shape, for ``print(model)``."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, int8 rows"


class Int8Embedding(Int8Rows):
    """A frozen ``nn.Embedding``."""

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids ``(...)`` to embeddings ``(..., D)``."""
        return self.rows(ids, self.dtype)


class Int8Head(Int8Rows):
    """A frozen output head without bias."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``(..., D)`` to logits ``(..., V)``."""
        return _Product.apply(hidden, self.weight, self.scales)


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scales``, the product taken in float32 and rounded once."""
    return codes.to(torch.float32).mul_(scales.float().unsqueeze(-1)).to(dtype)


def quantize_embeddings_(model: Any) -> None:
    """Replace embedding and output head of a transformers model by 8-bit ones; tied ones stay tied.

    Raises:
        ValueError: if one of them does more than look up or multiply. The model is then unchanged.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise ValueError(
            f"embedding_bits: the embedding is a {type(embedding).__name__}, which cannot be quantized (a plain "
            "nn.Embedding can): leave embedding_bits out"
        )
    if head is not None and (type(head) is not nn.Linear or head.bias is not None):
        kind = "has a bias" if type(head) is nn.Linear else f"is a {type(head).__name__}"
        raise ValueError(f"embedding_bits: the output head {kind} and cannot be quantized: leave embedding_bits out")
    codes, scales = made_of_rows(embedding.weight, quantize_rows)
    small = Int8Embedding(codes, scales, embedding.weight.dtype)
    model.set_input_embeddings(small.train(embedding.training))
    if head is None:
        return
    tied = head.weight is embedding.weight
    if not tied:
        codes, scales = made_of_rows(head.weight, quantize_rows)
    model.set_output_embeddings(Int8Head(codes, scales, head.weight.dtype).train(head.training))


@torch.no_grad()
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix: rows scaled to [-127, 127] by their largest absolute value, and rounded."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), BLOCK):
        rows = weight.detach()[start : start + BLOCK].float()
        largest = rows.abs().amax(dim=-1)
        # A row of zeros, such as that of a padding token, has no largest value to scale by.
        scale = torch.where(largest > 0, largest, 1.0) / 127
        scales[start : start + BLOCK] = scale
        codes[start : start + BLOCK] = (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


class _Product(torch.autograd.Function):
    """``hidden @ dequantize(codes).T``, a block of rows at a time in both directions."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, codes_VD: Tensor, scales_V: Tensor) -> Tensor:
        ctx.save_for_backward(codes_VD, scales_V)
        return torch.cat([hidden @ block.T for block in _blocks(codes_VD, scales_V, hidden.dtype)], dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        codes_VD, scales_V = ctx.saved_tensors
        total, start = grad.new_zeros(*grad.shape[:-1], codes_VD.shape[1]), 0
        for block in _blocks(codes_VD, scales_V, grad.dtype):
            total += grad[..., start : start + len(block)] @ block
            start += len(block)
        return total, None, None


def _blocks(codes_VD: Tensor, scales_V: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for start in range(0, len(codes_VD), BLOCK):
        yield dequantize_rows(codes_VD[start : start + BLOCK], scales_V[start : start + BLOCK], dtype)
