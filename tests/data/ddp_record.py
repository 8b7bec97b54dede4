"""For test_ranks.py: fit, and write down what this rank was trained on; as a script it starts the other ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

from lit_lora.data.batches.resume import align_loop_progress
from lit_lora.data.datamodule import SFTDataModule


class Recorder(pl.LightningModule):
    """Keeps the example ids of every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["example_ids"].tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        raise AssertionError("there is no validation data")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint):
        align_loop_progress(checkpoint, self.trainer)


def fit(*, train: str, cache_dir: str, devices: int, steps: int, save: str, resume: str | None) -> list[list[int]]:
    """Train, save a checkpoint, and return what this rank was trained on. A step is two micro-batches."""
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=2 // devices,
        max_steps=steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = SFTDataModule(train, tokenizer="bytes", batch_size=1, cache_dir=cache_dir)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(save)
    Path(f"{save}.rank{trainer.global_rank}.json").write_text(json.dumps(module.seen))
    return module.seen


if __name__ == "__main__":
    fit(**json.loads(sys.argv[1]))
    if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads may abort the process
        torch.distributed.destroy_process_group()
