"""For test_exact_resume.py: a run with everything the command line wires in, its result written down.

As a script (one JSON argument) it starts the other ranks itself.
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
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, SFTDataModule
from lit_lora.callbacks import GradientNormLogger, TrainingCheckpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO
from tests.tiny import grouped


class Watch(L.Callback):
    """Keeps the order of the examples; after so many batches of the whole run, sends itself a signal."""

    def __init__(self, stop_after: int | None, signum: int) -> None:
        self.stop_after, self.signum = stop_after, signum
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch["example_ids"].tolist())
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if self.stop_after is not None and done + 1 == self.stop_after and trainer.is_global_zero:
            os.kill(os.getpid(), self.signum)


def run(
    *,
    folder: str,
    base: str,
    train: str,
    devices: int = 1,
    accumulate: int = 1,
    stop_after: int | None = None,
    signum: int = signal.SIGTERM,
    ckpt_path: str | None = None,
    seed: int = 0,
    dropout: float = 0.0,
    quantized: bool = False,
    max_steps: int = -1,
    max_epochs: int = 2,
    data: dict[str, Any] | None = None,
    module_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """Train; a run that was stopped says so."""
    torch.manual_seed(1)
    module = LoRALightningModule(
        base,
        lora=LoRAConfig(r=4, lora_dropout=dropout, target_modules="all-linear"),
        quantization=QuantizationConfig() if quantized else None,
        **grouped(**{"learning_rate": 0.01, "lr_schedule": "cosine", "warmup_ratio": 0.1, **(module_options or {})}),
    )
    with torch.device("cuda" if accelerator == "gpu" else "cpu"):
        module.configure_model()  # here, so that equal seeds make equal adapters
    L.seed_everything(seed, verbose=False)
    options = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": str(Path(train).parent / "cache"), **(data or {})}
    others = dict(trainer_options or {})
    plugins = others.pop("plugins", [])
    watch, checkpoint = Watch(stop_after, signum), TrainingCheckpoint(every_n_steps=1000)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        max_steps=max_steps,
        max_epochs=max_epochs if max_steps < 0 else -1,
        callbacks=[watch, GradientNormLogger(), checkpoint],
        plugins=[AtomicCheckpointIO(), *plugins],
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **others,
    )
    stopped = False
    try:
        trainer.fit(module, datamodule=SFTDataModule(train, **options), ckpt_path=ckpt_path)
    except SIGTERMException:
        stopped = True
    except SystemExit as error:
        stopped = isinstance(error.__context__, KeyboardInterrupt)
        assert stopped
    return {
        "stopped": stopped,
        "ckpt_path": str(checkpoint.last_path),
        "seen": watch.seen,
        "weights": {name: p.detach().clone() for name, p in module.trainable_parameters().items()},
        "moments": trainer.optimizers[0].state_dict()["state"] if trainer.optimizers else {},
        "learning_rate": [group["lr"] for group in trainer.optimizers[0].param_groups],
        "losses": module.flush_metrics().losses,
        "rates": [step.learning_rate for step in module.training_metrics.steps],
        "norms": [step.grad_norm for step in module.training_metrics.steps],
        "validation": module.training_metrics.validation,
        "global_step": trainer.global_step,
    }


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    result = run(**settings)
    torch.save(result, Path(settings["folder"]) / f"result.rank{os.environ.get('LOCAL_RANK', '0')}.pt")
    if torch.distributed.is_initialized():  # left to the interpreter's end, gloo's threads may abort the process
        torch.distributed.destroy_process_group()
