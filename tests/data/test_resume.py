"""N micro-batches at once equal k, a stop, and the rest: real Trainer runs that record what they are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lit_lora.data.datamodule import SFTDataModule
from lit_lora.data.resume import align_loop_progress, rank_batches_consumed

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]

NUM_EXAMPLES, BATCHES, EPOCHS = 10, 5, 3


class Stopped(Exception):
    """Stands for whatever ends a run early."""


class Recorder(pl.LightningModule):
    """One weight whose value depends on every batch and their order."""

    def __init__(self, align: bool, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.align = align
        self.fail_at = fail_at
        self.seen: list[list[int]] = []
        self.epochs: list[int] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append(self.trainer.current_epoch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if self.fail_at == len(self.seen):
            raise Stopped
        self.seen.append(batch["example_ids"].tolist())
        return (self.weight * batch["target_ids"].double().mean() / 100 + torch.rand(()) * 0).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert batch["num_tokens"] > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.align:
            align_loop_progress(checkpoint, self.trainer)


class SaveAt(pl.Callback):
    """Saves at one moment and ends the run there."""

    def __init__(self, path: Path, hook: str, batches: int) -> None:
        self.path = path
        self.hook = hook
        self.batches = batches

    def _save(self, hook: str, trainer: pl.Trainer, module: Recorder) -> None:
        if hook == self.hook and len(module.seen) == self.batches and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)
            if hook != "on_exception":
                raise Stopped

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self._save("on_train_batch_end", trainer, module)

    def on_train_epoch_start(self, trainer, module) -> None:
        self._save("on_train_epoch_start", trainer, module)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._save("on_train_epoch_end", trainer, module)

    def on_validation_end(self, trainer, module) -> None:
        self._save("on_validation_end", trainer, module)

    def on_exception(self, trainer, module, exception) -> None:
        self._save("on_exception", trainer, module)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"question {i}", "completion": "answer " * (1 + i % 4)} for i in range(NUM_EXAMPLES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_module(data_file: Path, **options: Any) -> SFTDataModule:
    options = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": data_file.parent / "cache"} | options
    return SFTDataModule(str(data_file), **options)


def trainer(**options: Any) -> pl.Trainer:
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def run(
    data_file: Path,
    module: Recorder,
    *,
    ckpt_path: Path | None = None,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Recorder:
    trainer(**options).fit(module, datamodule=data_module(data_file, **data or {}), ckpt_path=ckpt_path)
    return module


def stop_and_resume(
    data_file: Path,
    tmp_path: Path,
    hook: str,
    batches: int,
    *,
    align: bool = True,
    data: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Recorder, list[list[int]], Recorder]:
    """The uninterrupted run, what the stopped run saw, and the resumed run."""
    path = tmp_path / "stopped.ckpt"
    first = Recorder(align, fail_at=batches if hook == "on_exception" else None)
    with pytest.raises(Stopped):
        run(data_file, first, data=data, callbacks=[SaveAt(path, hook, batches)], **options)
    resumed = run(data_file, Recorder(align), ckpt_path=path, data=data, **options)
    return whole_run(data_file, data, options), first.seen, resumed


WHOLE_RUNS: dict[str, Recorder] = {}


def whole_run(data_file: Path, data: dict[str, Any] | None, options: dict[str, Any]) -> Recorder:
    key = repr((data, options))
    if key not in WHOLE_RUNS:
        WHOLE_RUNS[key] = run(data_file, Recorder(align=True), data=data, **options)
    return WHOLE_RUNS[key]


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


@pytest.fixture(scope="module")
def checkpoint(data_file, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "stopped.ckpt"
    with pytest.raises(Stopped):
        run(data_file, Recorder(align=True), callbacks=[SaveAt(path, "on_train_batch_end", 2)])
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 5}, "batch_size was 2 and is 5"),
        ({"packing": False}, "packing was True and is False"),
        ({"limit": 9}, "data.limit was None and is 9"),
        ({"max_length": 40}, "max_length was 1024 and is 40"),
    ],
)
def test_resume_with_other_settings_is_refused(data_file, checkpoint, data, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(data_file, Recorder(align=True), ckpt_path=checkpoint, data=data)


def test_resume_with_other_data_is_refused(data_file, checkpoint, tmp_path) -> None:
    other = tmp_path / "train.jsonl"
    other.write_text(data_file.read_text().replace("question 3", "question x"))
    with pytest.raises(ValueError, match=r"data\.train was .* and is "):
        run(other, Recorder(align=True), ckpt_path=checkpoint)


class Renamed(SFTDataModule):
    """What a user's script may derive."""


def in_a_function() -> type[SFTDataModule]:
    class Local(SFTDataModule):
        pass

    return Local


@pytest.mark.parametrize(
    ("saved_by", "resumed_by"),
    [(SFTDataModule, Renamed), (Renamed, SFTDataModule), (Renamed, in_a_function()), (in_a_function(), Renamed)],
)
def test_a_class_of_another_name_resumes_in_the_same_place(data_file, tmp_path, saved_by, resumed_by) -> None:
    path, first, resumed = tmp_path / "stopped.ckpt", Recorder(align=True), Recorder(align=True)
    options = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": data_file.parent / "cache"}
    stopping = trainer(callbacks=[SaveAt(path, "on_train_batch_end", 7)])
    with pytest.raises(Stopped):
        stopping.fit(first, datamodule=saved_by(str(data_file), **options))
    trainer().fit(resumed, datamodule=resumed_by(str(data_file), **options), ckpt_path=path)
    whole = whole_run(data_file, None, {})
    assert first.seen + resumed.seen == whole.seen
    assert torch.equal(resumed.weight, whole.weight)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        trainer().fit(Recorder(align=True), datamodule=resumed_by(str(data_file), seed=1, **options), ckpt_path=path)


def test_a_class_of_another_name_is_refused_where_the_module_aligns_nothing(data_file, checkpoint) -> None:
    data = Renamed(str(data_file), tokenizer="bytes", batch_size=2, cache_dir=data_file.parent / "cache")
    with pytest.raises(ValueError, match=r"stopped\.ckpt holds no position in the data of Renamed"):
        trainer().fit(Recorder(align=False), datamodule=data, ckpt_path=checkpoint)


@pytest.mark.parametrize("named", ["a plain loader", "Plain"])
def test_data_without_positions_cannot_continue_from_one(data_file, checkpoint, named) -> None:
    class Plain(pl.LightningDataModule):
        def train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader([{"example_ids": torch.tensor([0]), "target_ids": torch.ones(1)}])

    Plain.__qualname__ = "Plain"
    data = {"datamodule": Plain()} if named == "Plain" else {"train_dataloaders": Plain().train_dataloader()}
    with pytest.raises(ValueError, match=f"in the data of SFTDataModule, and this run's data come from {named}, which"):
        trainer().fit(Recorder(align=True), **data, ckpt_path=checkpoint)


def test_validating_a_checkpoint_with_other_settings_is_fine(data_file, checkpoint) -> None:
    data = data_module(data_file, validation_fraction=0.2, seed=3)
    trainer().validate(Recorder(align=True), datamodule=data, ckpt_path=checkpoint, verbose=False)


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
