"""What all examples of a batch begin with, such as a system prompt, is computed once.

Attention is causal and positions restart with each example, so the hidden states of equal first tokens are equal, and
their gradient is the sum over the examples. That is exact as long as nothing random happens to them (dropout). On a
CPU only: the CUDA kernel takes one list of offsets for queries and keys alike.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from lit_lora.batch import Batch
from lit_lora.kernels.blockwise_attention import is_faster


def share_prefix(batch: Batch, *, min_saved: int = 16) -> Batch:
    """A packed batch with the common beginning of its examples as an example of its own, and the rest of each after it.

    Args:
        batch: of two or more examples with ``target_positions``, as ``collate_packed`` makes it, on a CPU.
        min_saved: rows; a batch that would not become shorter by as many is left as it is. A tenth of all
            rows where, in bfloat16, a long example takes the slower of two attention kernels then.

    Returns:
        ``batch``, or one with ``shared_prefix``: how many rows of it are the common beginning. It ends before the first
        position from which a token is predicted, so every target keeps a row of its own.
    """
    lengths = batch["seq_lens"]
    positions_T, ids_T = batch["position_ids"].squeeze(0), batch["input_ids"].squeeze(0)
    target_rows = batch["target_positions"]
    if not is_faster(max(lengths), torch.bfloat16):
        min_saved = max(min_saved, sum(lengths) // 10)
    num_shared = min(lengths) - 1
    if target_rows.numel():
        num_shared = min(num_shared, int(positions_T[target_rows].min()))
    if num_shared * (len(lengths) - 1) < min_saved:
        return batch
    starts = [0, *accumulate(lengths)][:-1]
    beginnings_NP = torch.stack([ids_T[start : start + num_shared] for start in starts])
    num_shared = int((beginnings_NP == beginnings_NP[0]).all(0).long().cumprod(0).sum())
    if num_shared * (len(lengths) - 1) < min_saved:
        return batch
    kept_T = positions_T >= num_shared
    kept_T[:num_shared] = True
    row_of_T = kept_T.cumsum(0) - 1
    seq_lens = [num_shared, *(length - num_shared for length in lengths)]
    return {
        **batch,
        "input_ids": ids_T[kept_T][None],
        "position_ids": positions_T[kept_T][None],
        "seq_lens": seq_lens,
        "cu_seq_lens": torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32),
        "target_positions": row_of_T[target_rows],
        "shared_prefix": num_shared,
    }
