"""torchtune's LoRA, one process: ``PYTHON -m benchmarks.peers.torchtune_worker torchtune job.json`` prints its numbers.

torchtune needs an older torchao than others do, so ``train.py --torchtune PYTHON`` runs this by the interpreter that
has it. It is torchtune's loop (``recipes/lora_finetune_single_device.py``): its model, its collation, its loss in
chunks, its converted weights, one dtype for all, its fused AdamW; the examples, their order, rank, scale, layers and
learning rate are the job's. torchtune draws its own initial adapter, and does not clip.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Job, clock_of, examples_of, num_steps, result_of


def torchtune(job: Job) -> dict[str, Any]:
    """The job by torchtune; in bfloat16, as in its own configs, the adapters are so, too."""
    import torch
    from safetensors.torch import load_file
    from torchtune import training
    from torchtune.data import padded_collate_sft
    from torchtune.models.convert_weights import hf_to_tune
    from torchtune.models.llama3_2 import lora_llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    assert not job["quantized"], "torchtune's quantized bases are for CUDA"
    torch.set_num_threads(job["threads"])
    examples, folder = examples_of(job), Path(job["base_folder"])
    base = json.loads((folder / "config.json").read_text())
    heads = {"num_heads": base["num_attention_heads"], "num_kv_heads": base["num_key_value_heads"]}
    with training.set_default_dtype(getattr(torch, job["dtype"])):
        model = lora_llama3_2(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=base["vocab_size"],
            num_layers=base["num_hidden_layers"],
            **heads,
            embed_dim=base["hidden_size"],
            max_seq_len=max(len(ids) for ids, _ in examples),
            intermediate_dim=base["intermediate_size"],
            norm_eps=base["rms_norm_eps"],
            rope_base=int(base.get("rope_theta") or base["rope_parameters"]["rope_theta"]),
            scale_factor=1,
            lora_rank=8,
            lora_alpha=16,
            tie_word_embeddings=base["tie_word_embeddings"],
        )
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    weights = hf_to_tune(stored, **heads, dim=base["hidden_size"])
    left_out, unknown = model.load_state_dict(weights, strict=False)
    assert not unknown, unknown
    assert all("lora" in name for name in left_out), left_out
    adapters = get_adapter_params(model)
    set_trainable_params(model, adapters)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=job["learning_rate"], fused=True
    )
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    samples = [
        {"tokens": ids, "labels": [token if keep else -100 for token, keep in zip(ids, mask, strict=True)]}
        for ids, mask in examples
    ]
    size, clock, losses = job["batch_size"], clock_of(job), []
    model.train()
    for step in range(num_steps(job)):
        batch = padded_collate_sft(samples[step * size : (step + 1) * size], padding_idx=0, ignore_idx=-100)
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        loss = loss_of(model(batch["tokens"]), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        clock.end()
    return result_of(job, clock, losses)


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        print("\n" + json.dumps(torchtune(json.load(file))))
