"""Run by ``test_rank_monitor.py`` in two processes: one of them dies, in one way or the other."""

from __future__ import annotations

import os
import signal
import sys
import time

import lightning.pytorch as pl
from plain_projects import AdapterModel

from lit_lora.callbacks import RankMonitor


class Dying(AdapterModel):
    how, rank = sys.argv[1], int(sys.argv[2])

    def training_step(self, batch, batch_idx):
        if self.how == "pause":  # by the test, which reads the process ids
            print("pid", os.getpid(), flush=True)
            time.sleep(0.3)
        if batch_idx == 2 and self.global_rank == self.rank:
            if self.how == "raise":
                raise ValueError("the data of this rank is spoilt")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
        return self.step(batch)


if __name__ == "__main__":
    monitor = RankMonitor(timeout_s=3.0 if Dying.how == "pause" else 6.0, interval_s=0.5)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=6, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(Dying())
    print("finished in order", time.monotonic())
