"""Verdicts on made-up losses: what falls passes, what does not fails."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from plain_projects import PlainModel

from lit_lora.callbacks import ConvergenceAssertion, ConvergenceError


class Scripted(PlainModel):
    """Its loss follows a script, one entry a micro-batch."""

    def __init__(
        self,
        losses: list[float],
        *,
        logged: str | None = None,
        scale: float = 1.0,
        targets: list[int] | None = None,
    ) -> None:
        super().__init__(lr=0.0)
        self.targets = targets
        self.losses = losses
        self.logged = logged
        self.scale = scale
        self.num_batches = 0

    def training_step(self, batch, batch_idx):
        loss = self.step(batch) * 0 + self.losses[self.num_batches]
        self.num_batches += 1
        if self.logged == "step":
            self.log("train_loss", loss.detach())
        if self.targets is not None:
            self.log("train_targets", float(self.targets[self.num_batches - 1]))
        if self.logged == "epoch":
            self.log("train_loss", loss.detach(), on_step=False, on_epoch=True)
        return loss * self.scale

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.logged == "late":
            self.log("train_loss", torch.tensor(self.losses[self.num_batches - 1]))


def test_falling_loss_passes_and_is_written(make_trainer, tmp_path):
    callback = ConvergenceAssertion(0.3, 2, on_failure="raise")
    make_trainer(callback, max_steps=6).fit(Scripted([4.0, 4.0, 3.0, 2.0, 2.0, 2.0]))
    assert callback.verdict.passed
    content = json.loads((tmp_path / "convergence.json").read_text())
    assert content["passed"] is True
    assert (content["first_mean"], content["last_mean"], content["decrease"]) == (4.0, 2.0, 0.5)
    assert content["loss_source"] == "training_step"


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([2.0, 2.0, 2.0, 2.0, 2.0, 1.9], "loss fell by 2.5%"),
        ([2.0, 2.0, 2.0, 2.0, 4.0, 4.0], "loss rose by 100.0%"),
        ([2.0, 2.0, 2.0, 2.0, float("nan"), 1.0], "not finite"),
        ([2.0, 2.0, float("nan"), 2.0, 1.0, 1.0], r"not finite \(step 3\)"),
        ([2.0, 2.0, float("inf"), 2.0, 1.0, 1.0], "not finite"),
    ],
)
def test_loss_that_does_not_fall_fails_after_everything_is_saved(make_trainer, tmp_path, losses, message):
    callback = ConvergenceAssertion(0.3, 2, on_failure="raise")
    with pytest.raises(ConvergenceError, match=message):
        make_trainer(callback, max_steps=6).fit(Scripted(losses))
    assert callback.verdict.passed is False
    assert json.loads((tmp_path / "convergence.json").read_text())["passed"] is False


@pytest.mark.filterwarnings("ignore:The verdict on convergence was not written")
def test_a_verdict_that_cannot_be_written_is_an_error_once_the_others_have_saved(make_trainer, tmp_path):
    (tmp_path / "convergence.json").mkdir()
    (tmp_path / "convergence.json" / "in the way").touch()
    ended = []

    class After(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            ended.append(trainer.global_step)

    with pytest.raises(OSError, match="verdict on convergence could not be written"):
        make_trainer(ConvergenceAssertion(0.3, 2), After(), max_steps=6).fit(Scripted([4.0, 4.0, 3.0, 2.0, 2.0, 2.0]))
    assert ended == [6]


def test_warns_by_default(make_trainer):
    with pytest.warns(UserWarning, match="convergence: loss fell by 0.0%"):
        make_trainer(ConvergenceAssertion(0.3, 2), max_steps=4).fit(Scripted([1.0] * 4))


def test_rise_above_the_best_window_fails_where_limited(make_trainer):
    losses = [8.0, 8.0, 2.0, 2.0, 3.0, 3.0]
    make_trainer(ConvergenceAssertion(0.3, 2, max_rise=0.6, on_failure="raise"), max_steps=6).fit(Scripted(losses))
    with pytest.raises(ConvergenceError, match=r"rose 50.0% above its lowest, allowed are 40.0%"):
        make_trainer(ConvergenceAssertion(0.3, 2, max_rise=0.4, on_failure="raise"), max_steps=6).fit(Scripted(losses))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("monitor", [None, "train_loss"])
def test_returned_losses_are_averaged_over_the_window(make_trainer, accumulate, monitor):
    callback = ConvergenceAssertion(0.3, 2, monitor=monitor, on_failure="raise")
    losses = [4.0, 2.0, 3.0, 3.0, 1.0, 1.0, 1.5, 0.5]
    make_trainer(callback, max_steps=8 // accumulate, accumulate_grad_batches=accumulate).fit(Scripted(losses))
    expected = losses[:2] + losses[-2:] if accumulate == 1 else [3.0, 3.0, 1.0, 1.0]
    assert callback.losses == pytest.approx(expected)


def test_logged_metric_is_preferred_to_the_returned_loss(make_trainer, tmp_path):
    callback = ConvergenceAssertion(0.3, 2)
    make_trainer(callback, max_steps=4).fit(Scripted([4.0, 3.0, 2.0, 1.0], logged="step", scale=7.0))
    assert callback.losses == [4.0, 3.0, 2.0, 1.0]
    assert json.loads((tmp_path / "convergence.json").read_text())["loss_source"] == "train_loss"


def test_metric_logged_after_the_callbacks_is_never_mixed_with_returned_losses(make_trainer):
    callback = ConvergenceAssertion(0.3, 2)
    make_trainer(callback, max_steps=5).fit(Scripted([4.0, 3.0, 2.0, 1.0, 0.5], logged="late", scale=7.0))
    assert callback.losses == [4.0, 3.0, 2.0, 1.0]


def test_epoch_mean_is_not_taken_for_the_loss_of_a_step(make_trainer):
    callback = ConvergenceAssertion(0.3, 4)
    losses = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    make_trainer(callback, max_steps=8, limit_train_batches=4).fit(Scripted(losses, logged="epoch"))
    assert callback.losses == losses


def test_resumed_run_keeps_the_first_window(make_trainer, tmp_path):
    losses = [8.0, 8.0, 6.0, 6.0, 4.0, 4.0, 1.0, 1.0]
    first = ConvergenceAssertion(0.3, 2)
    trainer = make_trainer(first, max_steps=4, limit_train_batches=4)
    with pytest.warns(UserWarning, match="25.0%"):
        trainer.fit(Scripted(losses))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = ConvergenceAssertion(0.3, 2, on_failure="raise")
    make_trainer(second, max_steps=8, limit_train_batches=4).fit(
        Scripted(losses[4:]), ckpt_path=tmp_path / "half.ckpt", weights_only=True
    )
    assert second.losses == [8.0, 8.0, 1.0, 1.0]


def test_run_of_one_step_has_no_verdict(make_trainer):
    callback = ConvergenceAssertion(on_failure="raise")
    make_trainer(callback, max_steps=1).fit(PlainModel())
    assert callback.verdict.passed is None


@pytest.mark.parametrize("settings", [{"window": 0}, {"min_decrease": 30}, {"max_rise": -1.0}, {"on_failure": "stop"}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        ConvergenceAssertion(**settings)


def test_steps_without_a_target_do_not_count(make_trainer):
    losses, targets = [2.0, 2.0, 2.0, 0.0, 0.0, 0.0], [3, 4, 3, 0, 0, 0]
    callback = ConvergenceAssertion(0.3, 2)
    with pytest.warns(UserWarning, match="loss fell by 0.0%"):
        make_trainer(callback, max_steps=6).fit(Scripted(losses, logged="step", targets=targets))
    assert callback.losses == [2.0, 2.0, 2.0]
    none = ConvergenceAssertion(0.3, 2)
    make_trainer(none, max_steps=6).fit(Scripted([0.0] * 6, logged="step", targets=[0] * 6))
    assert none.verdict.passed is None


@pytest.mark.parametrize(
    ("first", "second", "passed"),
    [(2, 1, True), (2, 3, True), (2, 6, True), (1, 4, None)],
    ids=["narrower", "wider, in the record", "all of a short run", "wider than the record"],
)
def test_a_window_may_change_when_a_run_is_resumed_as_far_as_its_losses_are_there(
    make_trainer, tmp_path, first, second, passed
):
    losses = [8.0, 7.0, 6.0, 5.0, 4.0, 4.0, 4.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    num_first = 4 if second == 6 else 8
    trainer = make_trainer(ConvergenceAssertion(0.1, first), max_steps=num_first)
    trainer.fit(Scripted(losses, logged="step"))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    module = Scripted(losses, logged="step")
    module.num_batches = num_first
    callback = ConvergenceAssertion(0.1, second)
    make_trainer(callback, max_steps=12).fit(module, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert callback.verdict.passed is passed, callback.verdict
    if passed:
        expected = sum(losses[:second]) / second, sum(losses[-second:]) / second
        content = json.loads((tmp_path / "convergence.json").read_text())
        assert (content["first_mean"], content["last_mean"]) == pytest.approx(expected)
    else:
        assert "window was raised" in callback.verdict.detail
