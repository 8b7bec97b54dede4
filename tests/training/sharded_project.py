"""For test_sharded.py: runs that end with what they held and learned, written down.

As a script (one JSON argument, a list of runs) it starts the other ranks itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, SFTDataModule
from lit_lora.base.shards import held_bytes
from lit_lora.callbacks import GradientFlowAssertion, GradientNormLogger, TrainingCheckpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO
from tests.tiny import grouped


class Watch(L.Callback):
    """Lets all runs start with the same adapters; notes what of the base is held between steps."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.held.append(held_bytes(pl_module))


def run(
    *,
    folder: str,
    base: str,
    train: str,
    strategy: str = "auto",
    devices: int = 1,
    accumulate: int = 1,
    quantization: dict[str, Any] | None = None,
    max_steps: int = 20,
    ckpt_path: str | None = None,
    module_options: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    module = LoRALightningModule(
        base,
        lora=LoRAConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **(lora or {})}),
        quantization=None if quantization is None else QuantizationConfig(**quantization),
        **grouped(**{"learning_rate": 0.01, "lr_schedule": "cosine", "warmup_ratio": 0.1, **(module_options or {})}),
    )
    options = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": str(Path(train).parent / "cache"), **(data or {})}
    watch, checkpoint, flow = Watch(), TrainingCheckpoint(every_n_steps=1000), GradientFlowAssertion()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_steps=max_steps,
        callbacks=[watch, GradientNormLogger(), checkpoint, flow],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **(trainer_options or {}),
    )
    trainer.fit(module, datamodule=SFTDataModule(train, **options), ckpt_path=ckpt_path)
    return {
        "strategy": type(trainer.strategy).__name__,
        "ckpt_path": str(checkpoint.last_path),
        "held": max(watch.held),
        "path": str(module.path),
        "weights": {name: p.detach().clone() for name, p in module.trainable_parameters().items()},
        "losses": module.flush_metrics().losses,
        "norms": [step.grad_norm for step in module.training_metrics.steps],
        "validation": module.training_metrics.validation,
        "verdict": list(flow.verdict or ()),
        "base": flow.state_dict()["base"],
    }


if __name__ == "__main__":
    path, runs = sys.argv[1], json.loads(sys.argv[2])
    results: list[dict[str, Any]] = []
    for settings in runs:
        if "ckpt_path" not in settings and results and settings["folder"] == runs[len(results) - 1]["folder"]:
            settings["ckpt_path"] = results[-1]["ckpt_path"]  # a run goes on from the one before
        results.append(run(**settings))
    torch.save(results, f"{path}.rank{os.environ.get('LOCAL_RANK', '0')}.pt")
    if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads may abort the process
        torch.distributed.destroy_process_group()
