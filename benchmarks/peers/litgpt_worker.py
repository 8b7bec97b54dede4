"""litgpt's LoRA, one process: ``PYTHON -m benchmarks.peers.litgpt_worker litgpt job.json`` prints what it measured.

litgpt pins other versions than lit_lora, so ``train.py --litgpt PYTHON`` runs this by the interpreter that has it. It
is litgpt's loop (``litgpt/finetune/lora.py``): its model, its collation, its chunked head and loss, its converted
weights, at the precisions that it offers; the examples, their order, rank, scale, layers, optimizer and learning rate
are the job's. litgpt draws its own initial adapter, stacks q, k and v, and does not clip.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Job, clock_of, examples_of, num_steps, result_of

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-true"}


def litgpt(job: Job, precision: str | None = None) -> dict[str, Any]:
    """The job by litgpt; ``bf16-true``, its own choice for half precision, holds the adapters in bfloat16 too."""
    import lightning as L
    import torch
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from litgpt.utils import chunked_cross_entropy, load_checkpoint

    assert not job["quantized"], "litgpt's quantized bases are for CUDA"
    torch.set_num_threads(job["threads"])
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision or PRECISIONS[job["dtype"]])  # type: ignore[arg-type]
    projections = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    config = Config.from_name(job["litgpt_name"], lora_r=8, lora_alpha=16, lora_dropout=0.0, **projections)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / job["litgpt_name"]
        folder.mkdir()
        for file in Path(job["base_folder"]).iterdir():
            (folder / file.name).symlink_to(file)
        convert_hf_checkpoint(folder)
        with fabric.init_module(empty_init=False):
            model = GPT(config)
        mark_only_lora_as_trainable(model)
        module = fabric.setup_module(model)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(module.parameters(), lr=job["learning_rate"]))
        load_checkpoint(fabric, module, folder / "lit_model.pth", strict=False)
    counts = {"raw": 0, "raw_plus_prompt_template": 0}
    samples = [
        {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor([t if keep else -100 for t, keep in zip(ids, mask, strict=True)]),
            "token_counts": counts,
        }
        for ids, mask in examples_of(job)
    ]
    module.max_seq_length = max(len(sample["input_ids"]) for sample in samples)
    collate, size = get_sft_collate_fn(), job["batch_size"]
    clock, losses = clock_of(job), []
    module.train()
    for step in range(num_steps(job)):
        batch = collate(samples[step * size : (step + 1) * size])
        logits = module(batch["input_ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, batch["labels"][..., 1:])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        clock.end()
    return result_of(job, clock, losses)


RUNNERS = {
    "litgpt": litgpt,
    "litgpt_mixed": lambda job: litgpt(job, "bf16-mixed"),
}


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        print("\n" + json.dumps(RUNNERS[sys.argv[1]](json.load(file))))
