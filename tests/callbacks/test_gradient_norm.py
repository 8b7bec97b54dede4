"""Norms against a plain reference; stops, skips and warnings that really happen."""

from __future__ import annotations

import itertools
import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from plain_projects import AdapterModel, PlainModel

from lit_lora.callbacks import GradientNormLogger, NonFiniteError, gradient_norm
from lit_lora.callbacks._support.spikes import SpikeWatch


class Watched(AdapterModel):
    """Keeps the gradients that the callback must have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, optimizer):
        self.seen.append({name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None})


class Poisoned(AdapterModel):
    """The gradient of one parameter is NaN in some micro-batches."""

    def __init__(self, *batches: int) -> None:
        super().__init__()
        self.batches = batches
        self.batch = 0
        self.layers[1].lora_B.weight.register_hook(
            lambda grad: grad * torch.nan if self.batch in self.batches else grad
        )

    def on_train_batch_start(self, batch, batch_idx):
        self.batch = batch_idx


class BadLoss(AdapterModel):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        return loss * torch.inf if batch_idx == 2 else loss


def norm_of(gradients: dict[str, torch.Tensor], part: str) -> float:
    chosen = [grad.flatten() for name, grad in gradients.items() if part in name]
    return torch.cat(chosen).norm().item()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logged_norms_equal_plain_norms_before_clipping(make_trainer, logger, accumulate):
    model = Watched()
    make_trainer(
        GradientNormLogger(), logger=logger, max_steps=3, accumulate_grad_batches=accumulate, gradient_clip_val=1e-3
    ).fit(model)
    assert len(model.seen) == 3
    parts = {"total": "", "A": "lora_A", "B": "lora_B", "layers.0": "layers.0.", "layers.1": "layers.1."}
    for key, part in parts.items():
        expected = [norm_of(gradients, part) for gradients in model.seen]
        assert logger.values(f"grad_norm/{key}") == pytest.approx(expected, rel=1e-5), key
    assert expected[-1] > 1e-3  # so clipping would have shown


def test_logs_on_logging_steps_only_and_without_layers_if_asked(make_trainer, logger):
    make_trainer(GradientNormLogger(per_layer=False), logger=logger, log_every_n_steps=4).fit(AdapterModel())
    assert len(logger.values("grad_norm/total")) == 2
    assert {key for row in logger.rows for key in row if key.startswith("grad_norm")} == {
        "grad_norm/total",
        "grad_norm/A",
        "grad_norm/B",
    }


def test_nan_gradient_stops_before_the_update_and_names_parameter_step_and_examples(make_trainer, tmp_path):
    model = Poisoned(4)
    callback = GradientNormLogger()
    with pytest.raises(NonFiniteError, match=r"gradient of step 3 .* 1 parameters: layers.1.lora_B.weight"):
        make_trainer(callback, accumulate_grad_batches=2).fit(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert callback.verdict.passed is False
    record = json.loads((tmp_path / "non_finite_step_3.json").read_text())
    assert record["example_ids_by_rank_and_micro_batch"] == [[[16, 17, 18, 19], [20, 21, 22, 23]]]
    assert record["grad_norms"]["layers.1.lora_B.weight"] == "nan"
    assert isinstance(record["grad_norms"]["layers.0.lora_B.weight"], float)
    assert len(record["losses"]) == 2


def test_infinite_loss_stops(make_trainer):
    with pytest.raises(NonFiniteError, match="the loss of step 3 is not finite"):
        make_trainer(GradientNormLogger()).fit(BadLoss())


def test_skip_moves_nothing_under_adamw_goes_on_and_names_the_examples(make_trainer, tmp_path):
    model = Poisoned(3)
    before: dict[str, torch.Tensor] = {}
    moved: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            moved.append(any(not torch.equal(before[name], p) for name, p in pl_module.named_parameters()))

    callback = GradientNormLogger(on_non_finite="skip")
    told = r"skipped the update of step 4: .* Its examples are 12, 13, 14.*non_finite_step_4\.json"
    with pytest.warns(UserWarning, match=told):
        make_trainer(callback, Watch()).fit(model)
    record = json.loads((tmp_path / "non_finite_step_4.json").read_text())
    assert record["example_ids_by_rank_and_micro_batch"] == [[[12, 13, 14, 15]]]
    assert record["grad_norms"]["layers.1.lora_B.weight"] == "nan"
    assert len(list(tmp_path.glob("non_finite_step_*.json"))) == 1
    assert moved == [True, True, True, False, True, True, True, True]
    assert callback.num_non_finite == 1
    assert callback.verdict.passed


@pytest.mark.filterwarnings("ignore:.*skipped the update")
def test_too_many_skips_stop(make_trainer):
    with pytest.raises(NonFiniteError, match=r"step 4 .*2 steps were skipped before"):
        make_trainer(GradientNormLogger(on_non_finite="skip", max_skips=2)).fit(Poisoned(1, 2, 3))


def fp16_trainer(make_trainer, callback, scaler, **settings):
    return make_trainer(callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **settings)


def test_overflow_under_a_loss_scale_is_counted_and_no_error(make_trainer, logger):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    callback = GradientNormLogger()
    fp16_trainer(make_trainer, callback, scaler, logger=logger, max_steps=40).fit(AdapterModel())
    assert 5 < callback.num_non_finite < 35
    assert callback.verdict.passed
    assert logger.values("grad_norm/loss_scale")[-1] < 2.0**36
    assert 0 < callback.spikes.max_norm < 100  # unscaled


def test_a_step_that_the_loss_scale_skips_moves_nothing_and_is_reported(make_trainer, logger):
    model, scales, states = Poisoned(3), [], []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            scales.append(scaler.get_scale())
            moments = trainer.optimizers[0].state_dict()["state"].values()
            states.append([value.clone() for entry in moments for value in entry.values()])
            states[-1] += [p.detach().clone() for p in pl_module.parameters()]

    callback = GradientNormLogger()
    trainer = fp16_trainer(make_trainer, callback, scaler, logger=logger)
    trainer.callbacks.append(Watch())
    trainer.fit(model)
    same = [all(map(torch.equal, before, after)) for before, after in itertools.pairwise(states)]
    assert same == [False, False, True, False, False, False, False]
    assert scales == [1024.0] * 3 + [512.0] * 5
    assert logger.values("grad_norm/loss_scale") == scales
    assert logger.values("grad_norm/non_finite_steps") == [1.0] * 5
    assert callback.verdict.passed
    assert "8 steps, 1 dropped as not finite" in callback.verdict.detail


def test_underflow_of_the_loss_scale_stops(make_trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(NonFiniteError, match=r"loss scale fell to 0.5, below min_loss_scale=1"):
        fp16_trainer(make_trainer, GradientNormLogger(), scaler).fit(Poisoned(*range(8)))


def test_infinite_loss_under_a_loss_scale_stops(make_trainer):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(NonFiniteError, match="the loss of step 3 is not finite"):
        fp16_trainer(make_trainer, GradientNormLogger(), scaler).fit(BadLoss())


def test_spike_and_explosion_are_reported_with_their_step(make_trainer):
    class Spiky(AdapterModel):
        def training_step(self, batch, batch_idx):
            loss = self.step(batch)
            return loss * 100 if batch_idx == 12 else loss

    callback = GradientNormLogger(window=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(callback, max_steps=16).fit(Spiky(lr=0.0))
    messages = [str(warning.message) for warning in caught]
    assert any(message.startswith("loss spike at step 13: ") for message in messages)
    assert any(message.startswith("gradient explosion at step 13: ") for message in messages)
    assert (callback.spikes.num_spikes, callback.spikes.num_explosions) == (1, 1)


def test_a_ripple_on_a_flat_loss_is_no_spike():
    watch = SpikeWatch(window=20, spike_std=6.0, explosion_factor=10.0)
    for step in range(12):
        watch.add_loss(step, 2.0)
    watch.add_loss(12, 2.1)  # a spread of nothing would make it one
    assert watch.num_spikes == 0


def test_a_gradient_as_large_as_the_first_ones_is_no_explosion_however_small_they_became():
    watch = SpikeWatch(window=20, spike_std=6.0, explosion_factor=10.0)
    for step in range(60):
        watch.add_norm(step, 2.0 if step < 15 else 0.01)
    watch.add_norm(60, 0.5)  # an example not yet learned; a warning would fail the test
    with pytest.warns(UserWarning, match="gradient explosion at step 61"):
        watch.add_norm(61, 3.0)
    assert watch.num_explosions == 1


def test_spikes_are_measured_against_the_window_before_a_resume():
    watch, resumed = (SpikeWatch(window=20, spike_std=6.0, explosion_factor=10.0) for _ in range(2))
    for step in range(12):
        watch.add_loss(step, 2.0)
        watch.add_norm(step, 1.0)
    resumed.load_state_dict(watch.state_dict())
    with pytest.warns(UserWarning, match="loss spike at step 12"):
        resumed.add_loss(12, 4.0)
    with pytest.warns(UserWarning, match="gradient explosion at step 12"):
        resumed.add_norm(12, 11.0)
    assert (resumed.num_spikes, resumed.num_explosions) == (1, 1)


def test_sparse_gradients_are_measured(make_trainer, logger):
    class Sparse(PlainModel):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(4, 32, sparse=True)

        def step(self, batch):
            return self.loss(self(batch + self.embedding(torch.zeros(1, dtype=torch.int64))))

    make_trainer(GradientNormLogger(), logger=logger, max_steps=2).fit(Sparse())
    assert all(value > 0 for value in logger.values("grad_norm/embedding"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_non_finite": "ignore"}, "'stop' or 'skip'"),
        ({"max_skips": 0}, "max_skips"),
        ({"window": 1}, "window"),
        ({"explosion_factor": 1.0}, "explosion_factor"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GradientNormLogger(**settings)


@pytest.fixture(params=["as if reading cost a wait", pytest.param("cuda", marks=pytest.mark.gpu)])
def deferring(request, monkeypatch) -> dict[str, object]:
    """Trainer settings under which flags are left on the device between logging steps."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
        return {"accelerator": "gpu", "devices": 1}
    monkeypatch.setattr(gradient_norm, "_free_to_read", lambda device: False)
    return {}


def test_deferred_flags_are_read_on_logging_steps_and_name_their_own_step(make_trainer, deferring):
    trainer = make_trainer(GradientNormLogger(), log_every_n_steps=5, **deferring)
    with pytest.raises(NonFiniteError, match="gradient of step 3 "):
        trainer.fit(Poisoned(2))
    assert trainer.global_step == 4  # before the update of step 5


def test_deferred_flags_let_no_spoilt_checkpoint_be_written(make_trainer, deferring, tmp_path):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "spoilt.ckpt")

    trainer = make_trainer(GradientNormLogger(), Saves(), log_every_n_steps=50, **deferring)
    with pytest.raises(NonFiniteError, match="gradient of step 3 "):
        trainer.fit(Poisoned(2))
    assert not (tmp_path / "spoilt.ckpt").exists()


def test_deferred_flags_are_read_at_the_end(make_trainer, deferring):
    with pytest.raises(NonFiniteError, match="gradient of step 8 "):
        make_trainer(GradientNormLogger(), log_every_n_steps=50, **deferring).fit(Poisoned(7))


def test_deferred_skip_still_decides_before_the_update(make_trainer, deferring):
    model = Poisoned(2)
    with pytest.warns(UserWarning, match="skipped the update of step 3"):
        make_trainer(GradientNormLogger(on_non_finite="skip"), log_every_n_steps=50, **deferring).fit(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
