"""N micro-batches at once equal k, a stop, and the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lit_lora.data.batches.resume import align_loop_progress, rank_batches_consumed
from tests.data.resume_runs import (
    BATCHES,
    EPOCHS,
    NUM_EXAMPLES,
    SMALL_RUNS,
    Recorder,
    SaveAt,
    Stopped,
    data_module,
    run,
    stop_and_resume,
    trainer,
    whole_run,
)

pytestmark = SMALL_RUNS


STOPS = [
    ("on_train_batch_end", 2),
    ("on_train_batch_end", 5),
    ("on_train_batch_end", 7),
    ("on_train_batch_end", 10),
    ("on_exception", 0),
    ("on_exception", 3),
    ("on_exception", 5),
    ("on_exception", 8),
    ("on_train_epoch_end", 5),
    ("on_train_epoch_end", 10),
]


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize(("hook", "batches"), STOPS)
def test_stop_and_resume_equals_one_run(data_file, tmp_path, hook, batches, align) -> None:
    whole, first, resumed = stop_and_resume(data_file, tmp_path, hook, batches, align=align)
    assert len(whole.seen) == BATCHES * EPOCHS
    assert sorted(index for batch in whole.seen[:BATCHES] for index in batch) == list(range(NUM_EXAMPLES))
    assert whole.seen[:BATCHES] != whole.seen[BATCHES : 2 * BATCHES]
    assert first + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize(("hook", "batches"), [*STOPS[1:4], *STOPS[6:], ("on_train_epoch_start", 5)])
def test_stop_and_resume_under_max_steps(data_file, tmp_path, hook, batches) -> None:
    whole, first, resumed = stop_and_resume(data_file, tmp_path, hook, batches, max_epochs=-1, max_steps=13)
    assert len(whole.seen) == 13
    assert first + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


VARIANTS = {
    "1 worker": ({"num_workers": 1}, {}),
    "2 workers": ({"num_workers": 2}, {}),
    "validation every epoch, sanity check": (
        {"validation_fraction": 0.2, "batch_size": 1},
        {"num_sanity_val_steps": 2},
    ),
    "validation every 2 batches": ({"validation_fraction": 0.2, "batch_size": 1}, {"val_check_interval": 2}),
    "token budget": ({"max_tokens_per_batch": 130}, {}),
    "token budget, padded": ({"max_tokens_per_batch": 130, "packing": False}, {}),
    "limited epochs": ({"batch_size": 1}, {"limit_train_batches": 7}),
    "loader made anew every epoch": ({}, {"reload_dataloaders_every_n_epochs": 1}),
    "loader made anew, limited": ({}, {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": 4}),
    "not shuffled": ({"shuffle": False}, {}),
    "overfit": ({}, {"overfit_batches": 2}),
}


@pytest.mark.parametrize(("hook", "batches"), [("on_train_batch_end", 3), ("on_train_batch_end", 7)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stop_and_resume_in_every_setting(data_file, tmp_path, variant, hook, batches) -> None:
    data, options = VARIANTS[variant]
    batches = min(batches, 5) if variant == "overfit" else batches
    whole, first, resumed = stop_and_resume(data_file, tmp_path, hook, batches, data=data, **options)
    assert first + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("align", [True, False])
def test_stop_in_validation_at_the_epochs_end(data_file, tmp_path, align) -> None:
    data = {"validation_fraction": 0.2, "batch_size": 1}
    whole, first, resumed = stop_and_resume(data_file, tmp_path, "on_validation_end", 8, align=align, data=data)
    assert first + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("batches", [1, 2, 5, 6, 7])
def test_stop_within_accumulation_keeps_order_and_windows(data_file, tmp_path, batches) -> None:
    options = {"accumulate_grad_batches": 2}
    whole, first, resumed = stop_and_resume(data_file, tmp_path, "on_train_batch_end", batches, **options)
    assert first + resumed.seen == whole.seen
    assert resumed.trainer.global_step == whole.trainer.global_step == 3 * EPOCHS
    # Inside a window the gradient so far is the module's to keep; this one does not.
    if batches not in (1, 6):
        assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("steps", [3, 5, 8])
@pytest.mark.parametrize("resume_with", [{"max_epochs": -1, "max_steps": 13}, {"max_epochs": EPOCHS}])
def test_a_run_ended_by_max_steps_goes_on_in_the_epoch(data_file, tmp_path, steps, resume_with) -> None:
    stopped = trainer(max_epochs=-1, max_steps=steps)
    first = Recorder(align=True)
    stopped.fit(first, datamodule=data_module(data_file))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    resumed = run(data_file, Recorder(align=True), ckpt_path=tmp_path / "last.ckpt", **resume_with)
    whole = whole_run(data_file, None, resume_with)
    assert first.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)


@pytest.mark.parametrize("steps", [3, 8])
def test_order_goes_on_although_the_module_aligns_nothing(data_file, tmp_path, steps) -> None:
    """Lightning then gives the interrupted epoch the next number, and the one after it the next but one."""
    stopped = trainer(max_epochs=-1, max_steps=steps)
    first = Recorder(align=False)
    stopped.fit(first, datamodule=data_module(data_file))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    options = {"max_epochs": -1, "max_steps": 13}
    resumed = run(data_file, Recorder(align=False), ckpt_path=tmp_path / "last.ckpt", **options)
    assert first.seen + resumed.seen == whole_run(data_file, None, options).seen


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end"])
def test_after_a_stop_at_an_epochs_end_the_next_epoch_starts_in_full(data_file, tmp_path, hook) -> None:
    _, _, resumed = stop_and_resume(data_file, tmp_path, hook, BATCHES)
    assert resumed.epochs == [1, 2]
    assert resumed.trainer.fit_loop.epoch_progress.total.completed == EPOCHS


def test_overfitting_repeats_the_same_batches(data_file) -> None:
    seen = run(data_file, Recorder(align=True), overfit_batches=2).seen
    assert seen == [[0, 1], [2, 3]] * EPOCHS


def test_schedulers_and_hooks_may_ask_for_the_loader(data_file, tmp_path) -> None:
    class Curious(Recorder):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == BATCHES * EPOCHS
            return super().configure_optimizers()

        def on_train_batch_start(self, batch, batch_idx):
            assert len(self.trainer.datamodule.train_dataloader()) == BATCHES

    first = Curious(align=True)
    with pytest.raises(Stopped):
        run(data_file, first, callbacks=[SaveAt(tmp_path / "a.ckpt", "on_train_batch_end", 7)], data={"num_workers": 1})
    resumed = run(data_file, Curious(align=True), ckpt_path=tmp_path / "a.ckpt", data={"num_workers": 1})
    assert first.seen + resumed.seen == whole_run(data_file, None, {}).seen


def test_stopping_twice(data_file, tmp_path) -> None:
    seen: list[list[int]] = []
    path = None
    for number, batches in enumerate([4, 3, 6]):
        module = Recorder(align=True)
        save = SaveAt(tmp_path / f"{number}.ckpt", "on_train_batch_end", batches)
        with pytest.raises(Stopped):
            run(data_file, module, ckpt_path=path, callbacks=[save])
        seen += module.seen
        path = tmp_path / f"{number}.ckpt"
    seen += run(data_file, Recorder(align=True), ckpt_path=path).seen
    assert seen == whole_run(data_file, None, {}).seen


def test_data_state_is_plain_and_small(checkpoint) -> None:
    state = torch.load(checkpoint, weights_only=True)["SFTDataModule"]
    assert state["consumed"] == 2
    assert json.loads(json.dumps(state)) == state


def test_two_ranks_checkpoint_goes_on_in_one_process(data_file, tmp_path) -> None:
    """Three micro-batches of two ranks each are six of one; its counters are made to say so."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 2}
    data = {"batch_size": 1}
    path = tmp_path / "two.ckpt"
    with pytest.raises(Stopped):
        run(data_file, Recorder(True), callbacks=[SaveAt(path, "on_train_batch_end", 3)], data=data, max_epochs=2)
    saved = torch.load(path, weights_only=True)
    saved["SFTDataModule"] |= {"consumed": 6, "world_size": 2}
    torch.save(saved, path)
    resumed = run(data_file, Recorder(align=True), ckpt_path=path, data=data, **options)
    assert resumed.seen == whole_run(data_file, data, options).seen[6:]
    assert resumed.trainer.global_step == 3 + 2 + 5


def test_consumed_batches_that_ranks_cannot_share_are_refused() -> None:
    state = {"consumed": 5, "world_size": 1}
    assert rank_batches_consumed(state, 5) == 1
    with pytest.raises(
        ValueError, match="5 micro-batches of the epoch, which 2 ranks cannot share: resume with 1 ranks"
    ):
        rank_batches_consumed(state, 2)


def test_alignment_leaves_other_checkpoints_alone() -> None:
    checkpoint: dict[str, Any] = {"loops": {"fit_loop": {}}}
    fitting = trainer()
    fitting.state.fn = TrainerFn.FITTING
    align_loop_progress(checkpoint, fitting)
    assert checkpoint == {"loops": {"fit_loop": {}}}
