"""On a GPU: runs in every precision, clipped, resumed exactly, and without waits between logging steps."""

from __future__ import annotations

import signal
import warnings
from typing import Any

import lightning as L
import pytest
import torch

from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, SFTDataModule
from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    MemoryProfiler,
    ThroughputLogger,
)
from lit_lora.files.checkpoint import AtomicCheckpointIO
from tests.tiny import grouped
from tests.training.resume_project import run
from tests.training.test_exact_resume import assert_same_end, project  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # other versions of libraries
]
CLIPPED = {"gradient_clip_val": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"module_options": {"dtype": "float32"}},
    "bfloat16": {},
    "NF4": {"quantized": True},
    "bf16-mixed": {"trainer_options": {"precision": "bf16-mixed"}},
    "bf16-mixed over float32": {"module_options": {"dtype": "float32"}, "trainer_options": {"precision": "bf16-mixed"}},
    "16-mixed": {"module_options": {"dtype": "float16"}, "trainer_options": {"precision": "16-mixed"}},
    "recomputed": {"module_options": {"recompute": True}, "dropout": 0.1},
    "padded": {"data": {"packing": False}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_clipped_run_learns_and_resumes_bit_for_bit_inside_an_accumulation_window(project, tmp_path, way):  # noqa: F811
    settings = {**project, **WAYS[way], "accelerator": "gpu", "accumulate": 2, "max_steps": 6}
    # FlashAttention adds up its gradients in any order otherwise.
    settings["trainer_options"] = {**WAYS[way].get("trainer_options", {}), **CLIPPED, "deterministic": True}
    try:
        whole = run(folder=str(tmp_path / "whole"), **settings)
        stopped = run(folder=str(tmp_path / "run"), stop_after=7, signum=signal.SIGTERM, **settings)
        resumed = run(folder=str(tmp_path / "run"), ckpt_path=stopped["ckpt_path"], seed=99, **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert stopped["stopped"]
    assert_same_end(whole, resumed)
    assert whole["losses"][-1] < whole["losses"][0]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_in_every_precision(project, tmp_path, precision, algorithm):  # noqa: F811
    """A step of SGD with a rate of 1 is the gradient that it was given."""
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    options = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=1.0, fused=True), "lr_schedule": "constant", "warmup_ratio": 0.0,
    }  # fmt: skip
    settings = {**project, "accelerator": "gpu", "max_steps": 1, "module_options": options}
    before = _module(project).trainable_parameters()
    result = run(folder=str(tmp_path), trainer_options={"precision": precision, **clip}, **settings)
    moved = torch.cat([(result["weights"][name].cpu() - p.detach().cpu()).flatten() for name, p in before.items()])
    got = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert float(got) == pytest.approx(1e-3, rel=1e-2)


def _module(project, *, quantized: bool = False, **options: Any) -> LoRALightningModule:  # noqa: F811
    torch.manual_seed(1)
    module = LoRALightningModule(
        project["base"],
        lora=LoRAConfig(r=4, target_modules="all-linear"),
        quantization=QuantizationConfig() if quantized else None,
        **grouped(**{"learning_rate": 0.01, **options}),
    )
    with torch.device("cuda"):
        module.configure_model()
    return module


class NoWaits(L.Callback):
    """From the end of step ``first`` to the start of the last step, whatever waits for the device raises."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.num_watched = 0

    def on_train_batch_end(self, trainer, *_):
        watch = self.first <= trainer.global_step < trainer.max_steps - 1
        self.num_watched += watch
        _set_sync_debug_mode("error" if watch else "default")

    def on_exception(self, *_):
        _set_sync_debug_mode("default")


def _set_sync_debug_mode(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype feature")  # torch's remark about its own mode
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("way", ["bfloat16", "NF4", "bf16-mixed over float32", "float32"])
def test_steps_between_logging_steps_wait_for_nothing(project, tmp_path, way, workers):  # noqa: F811
    """16-mixed is left out: torch's loss scaler asks the device once a step whether to take it."""
    settings, watch = WAYS[way], NoWaits(first=3)
    module = _module(project, quantized=settings.get("quantized", False), **settings.get("module_options", {}))
    trainer = L.Trainer(
        accelerator="gpu", devices=1, max_steps=9, log_every_n_steps=50, accumulate_grad_batches=2,
        callbacks=[
            GradientNormLogger(), GradientFlowAssertion(), ConvergenceAssertion(-1.0), MemoryProfiler(),
            ThroughputLogger(), watch,
        ],
        plugins=[AtomicCheckpointIO()], default_root_dir=tmp_path, use_distributed_sampler=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False,
        **{**CLIPPED, **settings.get("trainer_options", {})},
    )  # fmt: skip
    data = SFTDataModule(
        project["train"], tokenizer="bytes", batch_size=2, num_workers=workers, cache_dir=str(tmp_path / "cache")
    )
    try:
        trainer.fit(module, datamodule=data)
    finally:
        _set_sync_debug_mode("default")
    assert watch.num_watched >= 5
    assert len(module.flush_metrics().losses) == 9


def test_batches_come_from_pinned_memory(project, tmp_path):  # noqa: F811
    data = SFTDataModule(project["train"], tokenizer="bytes", batch_size=2, cache_dir=str(tmp_path))
    trainer = L.Trainer(
        accelerator="gpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(_module(project), datamodule=data)
    batch = next(iter(data.train_dataloader()))
    seen = [x.is_pinned() for x in batch.values() if isinstance(x, torch.Tensor)]
    assert seen
    assert all(seen)


def test_eight_bits_with_dropout_leave_the_base_as_it_was(project, tmp_path):  # noqa: F811
    torch.manual_seed(1)
    module = LoRALightningModule(
        project["base"],
        lora=LoRAConfig(r=4, lora_dropout=0.1, target_modules="all-linear"),
        quantization=QuantizationConfig(bits=8),
    )
    flow = GradientFlowAssertion()
    trainer = L.Trainer(
        accelerator="gpu", devices=1, max_steps=4, callbacks=[flow], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        use_distributed_sampler=False, plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(module, datamodule=SFTDataModule(project["train"], tokenizer="bytes", batch_size=2))
    assert flow.verdict is not None
    assert flow.verdict.passed
