"""The products that a step cannot do without, alone: what the share of the limit is a share of. On a CPU."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.peers.job import Job, clock_of, examples_of, result_of, warm_up_of


def limit(job: Job, *, onednn: bool = True) -> dict[str, Any]:
    """The products that no exact step can do without, alone, in the job's shapes.

    Base forward and input gradient, the adapters' six narrow products, the head at supervised positions in both
    directions, and attention per example in both directions. No other work. Each by the fastest kernel that is known
    here: the ones that lit_lora uses, or, without oneDNN, those of any torch program.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch
    from torch import nn

    from lit_lora import load_base_model
    from lit_lora.kernels.products import linear, matmul
    from lit_lora.language_model.attention import SeqLens, no_mask, packed_attention_forward

    torch.set_num_threads(job["threads"])
    torch.backends.mkldnn.enabled = onednn
    model = load_base_model(job["base"], dtype=job.get("dtype", "float32"))
    dtype = model.dtype
    config = model.config
    layers = [[m.weight.detach() for m in layer.modules() if isinstance(m, nn.Linear)] for layer in model.model.layers]
    head = model.get_output_embeddings().weight.detach()
    examples, size = examples_of(job), job["batch_size"]
    clock, attention_s = clock_of(job), []
    widths = {n for weights in layers for w in weights for n in w.shape}
    for start in range(0, len(examples), size):
        batch = examples[start : start + size]
        lengths = [max(i for i, keep in enumerate(mask) if keep) + 1 for _, mask in batch]
        x = {n: torch.randn(sum(lengths), n, dtype=dtype) for n in widths}
        down = torch.randn(sum(lengths), 8, dtype=dtype)
        hidden = torch.randn(sum(sum(mask) for _, mask in batch), config.hidden_size, dtype=dtype)
        query, key, value = (
            torch.randn(1, num_heads, sum(lengths), config.head_dim, dtype=dtype, requires_grad=True)
            for num_heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        )
        attention_s.append(0.0)
        for weights in layers:
            for weight in weights:
                out, inner = weight.shape
                a, b = weight[:8], weight[:, :8].contiguous()
                linear(x[inner], weight)
                matmul(x[out], weight)
                for left, right in ((x[inner], a.t()), (down, b.t()), (x[out], b), (down, a)):
                    matmul(left, right)
                matmul(down.t(), x[inner])
                matmul(down.t(), x[out])
            began_s = time.time()
            attended, _ = packed_attention_forward(
                nn.Module(),
                query,
                key,
                value,
                no_mask(query.device),
                cu_seq_lens_q=torch.zeros(1),
                seq_lens=SeqLens(lengths),
            )
            attended.backward(attended.detach())
            attention_s[-1] += time.time() - began_s
        for row in range(0, len(hidden), 512):
            for block in head.split(4096):
                matmul(linear(hidden[row : row + 512], block), block)
        clock.end()
    return {**result_of(job, clock, [0.0]), "attention_s": attention_s[warm_up_of(job) :]}
