"""For test_sharded.py: runs that end with what they held and learned, written down.

As a script (one JSON argument, a list of runs) it starts the other ranks itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.device_mesh import init_device_mesh

from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, SFTDataModule, StepConfig
from lit_lora.base.shards import Sharding, held_bytes, held_tensors
from lit_lora.base.streamed import load_sharded_base
from lit_lora.build import make_trainable
from lit_lora.callbacks import GradientFlowAssertion, GradientNormLogger, RankMonitor, TrainingCheckpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO
from lit_lora.language_model.forward import placeholder_batch
from lit_lora.memory.storage_tracker import StorageTracker
from lit_lora.memory.traced_step import run_step
from tests.tiny import grouped


class Watch(L.Callback):
    """Lets all runs start with the same adapters; notes what of the base is held between steps; dies when told to."""

    def __init__(self, dies: str = "") -> None:
        self.held: list[int] = []
        self.held_on_device: list[int] = []
        self.allocated: list[int] = []
        self.dies, self.rank = (dies.split()[0], int(dies.split()[1])) if dies else ("", -1)

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(1)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.held.append(held_bytes(pl_module))
        on_device = [x for x in held_tensors(pl_module, trained=False) if x.device == trainer.strategy.root_device]
        self.held_on_device.append(sum(tensor.nbytes for tensor in on_device))
        if torch.cuda.is_available():
            self.allocated.append(torch.cuda.memory_allocated())
        self.die(trainer, "step", trainer.global_step >= 3)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.die(trainer, "validation", trainer.global_step >= 3)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.die(trainer, "save", trainer.global_step >= 4)

    def die(self, trainer, moment, due):
        if due and moment == self.dies and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


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
    dies: str = "",
    accelerator: str = "cpu",
) -> dict[str, Any]:
    L.seed_everything(0, verbose=False)
    module = LoRALightningModule(
        base,
        lora=LoRAConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **(lora or {})}),
        quantization=None if quantization is None else QuantizationConfig(**quantization),
        **grouped(**{"learning_rate": 0.01, "lr_schedule": "cosine", "warmup_ratio": 0.1, **(module_options or {})}),
    )
    options = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": str(Path(train).parent / "cache"), **(data or {})}
    watch, flow = Watch(dies), GradientFlowAssertion()
    checkpoint = TrainingCheckpoint(every_n_steps=2 if dies else 1000)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_steps=max_steps,
        callbacks=[watch, RankMonitor(timeout_s=20), GradientNormLogger(), checkpoint, flow],
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
        "held_on_device": watch.held_on_device[-1],
        "allocated": watch.allocated[-1:],
        "path": str(module.path),
        "weights": {name: p.detach().cpu().clone() for name, p in module.trainable_parameters().items()},
        "losses": module.flush_metrics().losses,
        "norms": [step.grad_norm for step in module.training_metrics.steps],
        "validation": module.training_metrics.validation,
        "verdict": list(flow.verdict or ()),
        "base": flow.state_dict()["base"],
    }


def measured_step(*, base: str, folder: str, quantization: dict[str, Any], lengths: list[int], layers: Any) -> int:
    """Bytes of the tensors that are alive at the peak of one step on this rank."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = load_sharded_base(base, Sharding(mesh), quantization=QuantizationConfig(**quantization))
    step = StepConfig(shared_prefix=False, recompute=layers)
    path = make_trainable(model, LoRAConfig(r=4), step).path
    assert path is not None
    tracker = StorageTracker(model)
    with tracker:
        tracker.add(held_tensors(model))
        run_step(model, placeholder_batch(lengths, packed=path.packed, device="cpu"), path, tracker)
    return tracker.peak().total


if __name__ == "__main__":
    path, runs = sys.argv[1], json.loads(sys.argv[2])
    results: list[dict[str, Any]] = []
    for settings in runs:
        if "lengths" in settings:
            results.append({"peak": measured_step(**settings)})
            continue
        if "ckpt_path" not in settings and results and settings["folder"] == runs[len(results) - 1]["folder"]:
            settings["ckpt_path"] = results[-1]["ckpt_path"]  # a run goes on from the one before
        results.append(run(**settings))
    torch.save(results, f"{path}.rank{os.environ.get('LOCAL_RANK', '0')}.pt")
    if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads may abort the process
        torch.distributed.destroy_process_group()
