"""Every callback can be pickled and copied, before a run and after: what a strategy or a sweep does with them."""

from __future__ import annotations

import copy
import pickle

import lightning.pytorch as pl
import pytest
from plain_projects import AdapterModel, PlainModel

import lit_lora.callbacks
from lit_lora.callbacks import (
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    StepProgress,
    TrainingCheckpoint,
)
from lit_lora.runs.run_record import PredictionWriter, RunRecord

PUBLIC = [getattr(lit_lora.callbacks, name) for name in lit_lora.callbacks.__all__]
KINDS = [*(kind for kind in PUBLIC if issubclass(kind, pl.Callback)), RunRecord, PredictionWriter]
SETTINGS = {"ConvergenceAssertion": {"min_decrease": -10.0}}
COPIES = {"pickle": lambda callback: pickle.loads(pickle.dumps(callback)), "deepcopy": copy.deepcopy}


def test_all_of_them_are_tried():
    assert len(KINDS) >= 10


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_callback_works_and_can_be_copied_after_a_run(make_trainer, kind, how):
    callback = COPIES[how](kind(**SETTINGS.get(kind.__name__, {})))
    if kind is not HFAdapterExport:  # it refuses a model that has no adapters
        needed = {"enable_checkpointing": kind is TrainingCheckpoint, "enable_progress_bar": kind is StepProgress}
        make_trainer(callback, **needed).fit(PlainModel())
    assert COPIES[how](callback).state_dict() == callback.state_dict()


@pytest.mark.parametrize("kind", [GradientNormLogger, GradientFlowAssertion])
def test_a_project_in_double_precision_can_use_it(make_trainer, kind):
    callback = kind()
    make_trainer(callback, precision="64-true").fit(AdapterModel())
    assert callback.verdict.passed
