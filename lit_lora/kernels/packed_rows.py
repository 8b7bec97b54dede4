"""Which rows of a packed batch see each other: what the attention kernels of a CPU go through.

Shapes: T rows of the batch, N heads, E head dimension, C rows that an example sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Example(NamedTuple):
    """Rows of the batch that see each other, and how many at the start of the batch they see too."""

    rows: slice
    prefix: int

    def whole(self, x_NTE: Tensor) -> Tensor:
        """What the example sees, its beginning first, ``(N, C, E)``; a view if it has no beginning."""
        own = x_NTE[:, self.rows]
        return torch.cat([x_NTE[:, : self.prefix], own], dim=1) if self.prefix else own

    def add_(self, total_NTE: Tensor, grad_NCE: Tensor) -> None:
        """The reverse of ``whole``, summed."""
        total_NTE[:, : self.prefix] += grad_NCE[:, : self.prefix]
        total_NTE[:, self.rows] += grad_NCE[:, self.prefix :]


def examples(seq_lens: list[int], shared_prefix: int) -> Iterator[Example]:
    """The examples of a batch; with ``shared_prefix`` the first is the beginning of the others."""
    start = 0
    for index, length in enumerate(seq_lens):
        yield Example(slice(start, start + length), shared_prefix if index else 0)
        start += length
