"""2,000 steps on a tiny model: memory, open files and step time stay flat; a poisoned example is named."""

from __future__ import annotations

import json
import os
import statistics

import lightning as L
import psutil
import pytest

from lit_lora import LoRAConfig, LoRALightningModule, SFTDataModule
from lit_lora.callbacks import GradientNormLogger, MemoryProfiler, NonFiniteError, TrainingCheckpoint
from lit_lora.files.checkpoint import AtomicCheckpointIO
from tests.tiny import config, grouped

STEPS = 2000


@pytest.fixture
def project(tmp_path):
    config("Llama", vocab_size=260).save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"say {i}", "completion": f"{i * i}"} for i in range(64)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def fit(project, module_class, *callbacks, max_steps, **data):
    module = module_class(f"random:{project / 'base'}", **grouped(lora=LoRAConfig(r=4), lr_schedule="constant"))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        default_root_dir=project,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, TrainingCheckpoint) for callback in callbacks),
    )
    loaded = SFTDataModule(
        str(project / "train.jsonl"), tokenizer="bytes", cache_dir=project / "cache", **{"batch_size": 4, **data}
    )
    trainer.fit(module, datamodule=loaded)
    return module


class OpenFiles(L.Callback):
    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 100 == 0:
            self.counts.append(psutil.Process(os.getpid()).num_fds())


def test_memory_files_and_step_time_stay_flat(project):
    files, memory = OpenFiles(), MemoryProfiler(max_growth_mib_per_1000_steps=8)
    module = fit(project, LoRALightningModule, files, memory, TrainingCheckpoint(every_n_steps=200), max_steps=STEPS)
    times = [step.step_time_s for step in module.training_metrics.steps]
    assert len(times) == STEPS
    assert len(set(files.counts[1:])) == 1, files.counts
    early, late = statistics.median(times[100:600]), statistics.median(times[-500:])
    assert late < 1.5 * early, f"step time rose from {early * 1e3:.2f} to {late * 1e3:.2f} ms"
    assert memory.verdict is not None
    assert memory.verdict.passed, memory.verdict


@pytest.mark.parametrize("packing", [True, False])
def test_a_poisoned_example_is_named_for_replay(project, packing):
    """The 18th example gives a loss that is not finite; the step's ids lead to it."""
    poisoned = 17

    class Poisoned(LoRALightningModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if poisoned in batch["example_ids"].tolist() else loss

    with pytest.raises(NonFiniteError, match="not finite"):
        fit(project, Poisoned, GradientNormLogger(), max_steps=100, batch_size=1, packing=packing)
    (path,) = project.glob("non_finite_step_*.json")
    record = json.loads(path.read_text())
    assert record["example_ids_by_rank_and_micro_batch"] == [[[poisoned]]]
    assert record["source_lines_by_rank_and_micro_batch"] == [[[poisoned + 1]]]
    assert str(record["step"]) in path.name
