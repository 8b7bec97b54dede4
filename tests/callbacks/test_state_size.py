"""What callbacks keep in a checkpoint is of one size, however long the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
from plain_projects import AdapterModel

from lit_lora import callbacks

WITHOUT_STATE = {"RankMonitor", "StepProgress"}
KEPT = {
    "ConvergenceAssertion": lambda: callbacks.ConvergenceAssertion(-9.0, 5),
    "GradientFlowAssertion": callbacks.GradientFlowAssertion,
    "GradientNormLogger": lambda: callbacks.GradientNormLogger(window=10),
    "HFAdapterExport": None,  # needs adapters of lit_lora or PEFT: its state is two numbers
    "MemoryProfiler": callbacks.MemoryProfiler,
    "ThroughputLogger": callbacks.ThroughputLogger,
    "TrainingCheckpoint": lambda: callbacks.TrainingCheckpoint(every_n_steps=10),
}


def num_values(state: Any) -> int:
    if isinstance(state, Mapping):
        return sum(1 + num_values(value) for value in state.values())
    return sum(map(num_values, state)) if isinstance(state, (list, tuple)) else 1


class Sizes(pl.Callback):
    """How much another callback keeps after each step."""

    def __init__(self, other: pl.Callback) -> None:
        self.other = other
        self.found: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(num_values(self.other.state_dict()))


def test_all_callbacks_are_looked_at() -> None:
    named = {n for n in callbacks.__all__ if issubclass(getattr(callbacks, n), pl.Callback)} - {"Check"}
    assert named == KEPT.keys() | WITHOUT_STATE


@pytest.mark.filterwarnings("ignore:loss spike", "ignore:gradient explosion")
@pytest.mark.parametrize("name", [name for name, make in KEPT.items() if make is not None])
def test_the_state_of_a_callback_does_not_grow_with_the_run(make_trainer, name):
    callback = KEPT[name]()
    sizes = Sizes(callback)
    trainer = make_trainer(callback, sizes, max_steps=80, enable_checkpointing=name == "TrainingCheckpoint")
    trainer.fit(AdapterModel())
    assert len(sizes.found) == 80
    assert len(set(sizes.found[29:])) == 1, sizes.found
