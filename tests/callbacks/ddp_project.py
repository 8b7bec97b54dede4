"""Run by ``test_ddp.py`` in two processes: all callbacks together, then trouble on the second process alone."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from plain_projects import AdapterModel
from test_adapter_export import Foreign, with_lit_lora

from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    MemoryBudgetExceeded,
    MemoryProfiler,
    NonFiniteError,
    StepProgress,
    ThroughputLogger,
)

ROOT = Path(sys.argv[1])


class Uneven(AdapterModel):
    """The loss of the second process is infinite in the third step."""

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        return loss * torch.inf if batch_idx == 2 and self.global_rank == 1 else loss


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **settings: object) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=list(callbacks),
        default_root_dir=ROOT,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"max_steps": 4, "enable_progress_bar": False, **settings},
    )
    trainer.fit(module)
    return trainer


def main() -> None:
    found: dict[str, object] = {}
    callbacks = [
        ConvergenceAssertion(0.0, 1),
        GradientFlowAssertion(),
        GradientNormLogger(),
        HFAdapterExport(),
        MemoryProfiler(budget_mib=1e6),
        StepProgress(),
    ]
    module = Foreign(with_lit_lora())
    module.val_losses = [1.0, 2.0] if int(os.environ.get("LOCAL_RANK", 0)) else [2.0, 1.0]
    trainer = fit(
        module,
        *callbacks,
        max_steps=6,
        val_check_interval=3,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_progress_bar=True,
    )
    found["verdicts"] = [list(callback.verdict) for callback in callbacks[:-1]]
    found["best"] = [callbacks[3].best_score, callbacks[3].best_step]

    throughput, skipping = ThroughputLogger(), GradientNormLogger(on_non_finite="skip")
    model = Uneven()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        fit(model, throughput, skipping, limit_val_batches=0)
    found["skipped"] = skipping.num_non_finite
    found["tokens"] = throughput.num_tokens
    found["weights"] = sum(float(p.double().sum()) for p in model.parameters())

    try:
        fit(Uneven(), GradientNormLogger(), limit_val_batches=0)
    except NonFiniteError as error:
        found["stopped"] = str(error)
    budget = 1.0 if trainer.global_rank == 1 else 1e6
    try:
        fit(AdapterModel(), MemoryProfiler(budget_mib=budget, on_exceeded="stop"), limit_val_batches=0)
    except MemoryBudgetExceeded as error:
        found["exceeded"] = str(error)
    (ROOT / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()  # left to the interpreter's end, gloo's threads may abort the process


if __name__ == "__main__":
    main()
