"""Every callback in a project that has nothing of lit_lora but the callbacks."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from plain_projects import AdapterModel, PlainModel

from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    MemoryProfiler,
    ThroughputLogger,
    Verdict,
)

ALL = [ConvergenceAssertion, GradientFlowAssertion, GradientNormLogger, MemoryProfiler, ThroughputLogger]


def all_callbacks() -> list[pl.Callback]:
    return [ConvergenceAssertion(min_decrease=0.01, window=2), *(cls() for cls in ALL[1:])]


@pytest.mark.parametrize("model", [PlainModel, AdapterModel])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_together_log_and_pass(make_trainer, logger, model, accumulate):
    callbacks = all_callbacks()
    trainer = make_trainer(*callbacks, logger=logger, accumulate_grad_batches=accumulate, limit_val_batches=1)
    trainer.fit(model())
    verdicts = [callback.verdict for callback in callbacks if hasattr(callback, "verdict")]
    assert len(verdicts) == 4
    assert all(isinstance(verdict, Verdict) and verdict.passed is not False for verdict in verdicts), verdicts
    assert len(logger.values("grad_norm/total")) == 8
    assert logger.values("memory/forward_peak_mib")
    assert len(logger.values("throughput/samples_per_s")) == 7


@pytest.mark.parametrize(
    "settings", [{"logger": False}, {"barebones": True, "log_every_n_steps": None, "enable_checkpointing": None}]
)
def test_all_survive_without_a_logger(make_trainer, settings):
    if settings.get("barebones"):
        settings = (
            dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"], None)
            | settings
        )
    callbacks = all_callbacks()
    trainer = make_trainer(*callbacks, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*barebones.*")
        trainer.fit(AdapterModel())
    assert callbacks[0].losses
    assert callbacks[2].verdict.passed
    assert callbacks[4].num_tokens == 8 * 4 * 32


def test_states_survive_a_strict_checkpoint_and_a_resume(make_trainer, tmp_path: Path):
    first = all_callbacks()
    trainer = make_trainer(*first, max_steps=5)
    trainer.fit(AdapterModel())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"]
    assert sum(any(key.startswith(cls.__name__) for cls in ALL) for key in saved) == 5

    second = all_callbacks()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*before the epoch ended.*")
        make_trainer(*second, max_steps=9).fit(AdapterModel(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert second[0]._first[:2] == first[0]._first[:2]
    assert second[0]._num_losses == 9
    assert second[1]._start == first[1]._start
    assert second[1].verdict.passed
    assert len(second[2].spikes.norms) == 9
    assert second[4].num_tokens == 9 * 4 * 32


@pytest.mark.parametrize("callback", all_callbacks(), ids=lambda callback: type(callback).__name__)
def test_empty_state_of_another_version_is_tolerated(callback):
    callback.load_state_dict({})


def test_two_records_keep_their_states_apart_and_one_goes_by_the_same_name_however_it_is_judged():
    assert ConvergenceAssertion(monitor="a").state_key != ConvergenceAssertion(monitor="b").state_key
    assert ConvergenceAssertion(0.3, 3).state_key == ConvergenceAssertion(0.5, 4).state_key
    assert MemoryProfiler(budget_mib=1).state_key == MemoryProfiler().state_key
    assert GradientFlowAssertion(check_base=False).state_key == GradientFlowAssertion().state_key


def test_interrupted_run_leaves_verdicts_without_an_answer(make_trainer, tmp_path: Path):
    class Interrupted(AdapterModel):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise ValueError("disk on fire")
            return super().training_step(batch, batch_idx)

    callbacks = all_callbacks()
    with pytest.raises(ValueError, match="disk on fire"):
        make_trainer(*callbacks).fit(Interrupted())
    assert [callback.verdict.passed for callback in callbacks[:4]] == [None] * 4
    assert json.loads((tmp_path / "convergence.json").read_text())["passed"] is None


def test_importing_the_package_costs_no_torch():
    code = "import sys, lit_lora.callbacks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
