"""Optimizers and schedules of every kind: right, exact over a stop, or refused before the model is loaded."""

from __future__ import annotations

import copy
import json
import signal

import bitsandbytes as bnb
import lightning as L
import pytest
import schedulefree
import torch
import transformers
import yaml
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import load_file
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from transformers.optimization import Adafactor, AdafactorSchedule

from lit_lora import LoRALightningModule, SFTDataModule
from lit_lora.data.batches.packing import collate_packed
from lit_lora.files.checkpoint import AtomicCheckpointIO, read_checkpoint
from lit_lora.files.csv_log import PatientCSVLogger
from lit_lora.interchange.peft_format import save_adapter
from tests.test_module import _loader, _module, _tokenized, _trainer, base  # noqa: F401 (a fixture)
from tests.tiny import grouped
from tests.training.resume_project import run
from tests.training.test_exact_resume import assert_same_end, project  # noqa: F401 (a fixture)

CONSTANT = {"lr_schedule": "constant", "warmup_ratio": 0.0}
OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "torch's Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "transformers' Adafactor": lambda p: Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False),
    "bitsandbytes AdamW8bit": lambda p: bnb.optim.AdamW8bit(p, lr=0.01),
    "bitsandbytes PagedAdamW": lambda p: bnb.optim.PagedAdamW(p, lr=0.01),
    "bitsandbytes Lion8bit": lambda p: bnb.optim.Lion8bit(p, lr=0.001),
}
SCHEDULE_FREE = {
    "AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "RAdam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", [*OPTIMIZERS, *(f"schedule-free {kind}" for kind in SCHEDULE_FREE)])
def test_a_run_with_it_resumes_bit_for_bit_inside_an_accumulation_window(project, tmp_path, name):  # noqa: F811
    build = OPTIMIZERS.get(name) or SCHEDULE_FREE[name.removeprefix("schedule-free ")]
    options = {"optimizer": build, **(CONSTANT if name.startswith("schedule-free") else {})}
    validated = {"val_check_interval": 2, "num_sanity_val_steps": -1}
    settings = {**project, "accumulate": 3, "module_options": options, "trainer_options": validated}
    settings["data"] = {"validation_fraction": 0.3}
    whole = run(folder=str(tmp_path / "whole"), **settings)
    stopped = run(folder=str(tmp_path / "run"), stop_after=7, signum=signal.SIGTERM, **settings)
    resumed = run(folder=str(tmp_path / "run"), ckpt_path=stopped["ckpt_path"], seed=99, **settings)
    assert stopped["stopped"]
    assert_same_end(whole, resumed)
    assert whole["losses"][-1] < whole["losses"][0]


# ------------------------------------------------------------------ schedule-free


def test_schedule_free_trains_as_in_a_plain_loop_and_is_evaluated_where_it_stands(base, tmp_path):  # noqa: F811
    """The oracle: the package's own protocol, in a loop of plain torch."""
    module = _module(base, optimizer=SCHEDULE_FREE["AdamW"], **CONSTANT)
    plain = copy.deepcopy(module)
    trainer = _trainer(tmp_path, max_steps=6, val_check_interval=2, num_sanity_val_steps=0)
    trainer.fit(module, _loader(4), _loader(4))

    batches = [*_loader(4)]
    optimizer = SCHEDULE_FREE["AdamW"](plain.trainable_parameters().values())
    validation = []
    for step in range(6):
        optimizer.train()
        optimizer.zero_grad()
        output = plain.compute_loss(batches[step % 2])
        (output.loss_sum / output.num_targets).backward()
        optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            outputs = [plain.compute_loss(batch) for batch in batches]
        validation.append(sum(float(o.loss_sum) for o in outputs) / sum(o.num_targets for o in outputs))
    for name, parameter in plain.trainable_parameters().items():
        torch.testing.assert_close(module.trainable_parameters()[name], parameter, rtol=1e-3, atol=1e-4)
    logged = [entry["val_loss"] for entry in module.training_metrics.validation]
    assert logged == pytest.approx(validation[1::2], rel=1e-5)


def test_what_is_exported_and_saved_of_schedule_free_is_where_it_stands(base, tmp_path):  # noqa: F811
    module = _module(base, optimizer=SCHEDULE_FREE["SGD"], **CONSTANT)
    trainer = _trainer(tmp_path, max_steps=4, accumulate_grad_batches=2, enable_checkpointing=True)
    trainer.fit(module, _loader(2))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = read_checkpoint(tmp_path / "end.ckpt")
    (state,) = saved["optimizer_states"]
    assert not state["param_groups"][0]["train_mode"]
    for index, (name, parameter) in enumerate(module.trainable_parameters().items()):
        assert torch.equal(saved["state_dict"][name], parameter)
        trained, z = saved["lit_lora"]["training_point"][name], state["state"][index]["z"]
        assert torch.equal(trained.lerp(z, 1 - 1 / 0.9), parameter)
        assert not torch.equal(trained, parameter)
    save_adapter(module.model, tmp_path / "adapter", base_model_name="x")
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, dict(module.model.named_parameters())[name.removeprefix("base_model.model.")])


# ------------------------------------------------------------------ several evaluations, and other refusals


class TwiceFrom(torch.optim.SGD):
    """Evaluates the batch twice from a given step on, as optimizers do that look for a flat place."""

    def __init__(self, params, first: int) -> None:
        super().__init__(params, lr=0.1)
        self.first, self.taken = first, 0

    def step(self, closure=None):
        self.taken += 1
        loss = super().step(closure)
        return super().step(closure) if self.taken >= self.first else loss


class NeverEvaluates(torch.optim.SGD):
    def step(self, closure=None):
        return super().step()


REFUSED = [
    (lambda p: torch.optim.LBFGS(p), {}, "LBFGS evaluates the batch [0-9]+ times"),
    (lambda p: TwiceFrom(p, 1), {}, "TwiceFrom evaluates the batch 2 times"),
    (lambda p: NeverEvaluates(p), {}, "NeverEvaluates evaluates the batch 0 times"),
    (lambda p: torch.optim.SparseAdam(p), {}, "SparseAdam cannot train adapters here: .* dense gradients"),
    (lambda p: bnb.optim.PagedAdEMAMix(p), {}, "PagedAdEMAMix cannot train adapters here: "),
    (lambda p: Adafactor(p), {}, "Adafactor has no learning rate .* relative_step"),
    (lambda p: torch.optim.SGD(p, lr=-1.0), {}, "model.optimizer cannot be built: .* Invalid learning rate"),
    (
        SCHEDULE_FREE["AdamW"],
        {"lr_schedule": "cosine"},
        "averages in place of a schedule.* set model.optimization.lr_schedule constant",
    ),
    (
        lambda p: schedulefree.AdamWScheduleFreeClosure(p, lr=0.1),
        {"accumulate_grad_batches": 2},
        "moves the parameters before it evaluates",
    ),
    (None, {"lr_scheduler": lr_scheduler.ReduceLROnPlateau}, "lightning.pytorch.cli.ReduceLROnPlateau, with monitor"),
    (None, {"lr_scheduler": AdafactorSchedule}, "model.lr_scheduler cannot be built: .* '_get_lr'"),
    (
        None,
        {"lr_scheduler": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=3), "max_steps": 4},
        "OneCycleLR has 3 steps, and the run 4 steps",
    ),
    (None, {"max_steps": -1, "max_time": "00:00:01:00"}, "lr_schedule 'cosine' .* none is known"),
]


@pytest.mark.parametrize(("optimizer", "options", "message"), REFUSED)
def test_it_is_refused_before_anything_is_loaded(tmp_path, optimizer, options, message):
    settings = {"lr_schedule": "constant" if optimizer else "cosine", **options}
    own = {name: settings.pop(name) for name in ("lr_schedule", "lr_scheduler") if name in settings}
    module = LoRALightningModule("random:nothing-of-that-name", **grouped(optimizer=optimizer, **own))
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, **settings).fit(module, [None])


def test_a_second_evaluation_that_the_trial_did_not_see_stops_the_run(base, tmp_path):  # noqa: F811
    module = _module(base, optimizer=lambda p: TwiceFrom(p, 5))
    with pytest.raises(RuntimeError, match="TwiceFrom evaluates the batch again in a step"):
        _trainer(tmp_path, max_steps=8).fit(module, _loader(4))
    assert len(module.training_metrics.steps) == 4


def test_an_optimizer_that_moves_before_it_evaluates_is_right_without_accumulation(base, tmp_path):  # noqa: F811
    module = _module(base, optimizer=lambda p: schedulefree.AdamWScheduleFreeClosure(p, lr=0.01), **CONSTANT)
    _trainer(tmp_path, max_steps=20).fit(module, _loader(4))
    assert module.training_metrics.losses[-1] < 0.9 * module.training_metrics.losses[0]


def test_the_trial_leaves_the_random_state_as_it_was(base, tmp_path):  # noqa: F811
    def drawing(parameters):
        torch.rand(3)
        return torch.optim.SGD(parameters, lr=0.1)

    module = _module(base, optimizer=drawing)
    trainer = _trainer(tmp_path)
    trainer.strategy._lightning_module = module
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    module._optimization.try_out(trainer)
    assert torch.equal(torch.rand(2), expected)


# ------------------------------------------------------------------ clipping


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_gradients_are_clipped_in_every_precision(base, tmp_path, precision, algorithm, fused):  # noqa: F811
    """A step of SGD with a rate of 1 is the gradient that it was given."""
    module = _module(base, optimizer=lambda p: torch.optim.SGD(p, lr=1.0, fused=fused))
    before = {name: p.detach().clone() for name, p in module.trainable_parameters().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}  # Lightning by itself takes bf16-mixed on a CPU
    options = scaled if precision == "16-mixed" else {"precision": precision}
    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    _trainer(tmp_path, max_steps=1, **clip, **options).fit(module, _loader(4))
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in module.trainable_parameters().items()])
    got = moved.norm() if algorithm == "norm" else moved.abs().max()
    assert float(got) == pytest.approx(1e-3, rel=1e-3)
    assert module.training_metrics.steps[0].grad_norm > 0.01


# ------------------------------------------------------------------ schedules


SCHEDULES = {
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=10),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "transformers' cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 2, 10),
}


@pytest.mark.filterwarnings(
    "ignore:The epoch parameter in `scheduler.step", "ignore:Detected call of `lr_scheduler.step"
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_ones_own_steps_with_the_optimizer_and_is_exact_over_a_stop(project, tmp_path, name):  # noqa: F811
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    plain, expected = SCHEDULES[name](optimizer), []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        plain.step()
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "lr_scheduler": SCHEDULES[name]}
    settings = {**project, "max_steps": 5, "accumulate": 2, "module_options": options}
    whole = run(folder=str(tmp_path / "whole"), **settings)
    assert whole["rates"] == pytest.approx(expected)
    stopped = run(folder=str(tmp_path / "run"), stop_after=5, **settings)
    assert_same_end(whole, run(folder=str(tmp_path / "run"), ckpt_path=stopped["ckpt_path"], **settings))


@pytest.mark.parametrize("stop_after", [2, 3, 6])
def test_a_plateau_is_met_after_each_validation_and_exact_over_a_stop(project, tmp_path, stop_after):  # noqa: F811
    """A metric that falls is no improvement in mode max: each validation but the first halves the rate."""
    options = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
        "lr_scheduler": lambda o: ReduceLROnPlateau(o, "val_loss", mode="max", factor=0.5, patience=0),
    }
    settings = {
        **project,
        "data": {"validation_fraction": 0.3},
        "trainer_options": {"num_sanity_val_steps": -1, "val_check_interval": 2},
        "module_options": options,
    }
    whole = run(folder=str(tmp_path / "whole"), **settings)
    validations = sum(entry["step"] > 0 for entry in whole["validation"])
    assert validations > 2
    assert whole["learning_rate"] == [0.01 * 0.5 ** (validations - 1)]
    stopped = run(folder=str(tmp_path / "run"), stop_after=stop_after, **settings)
    resumed = run(folder=str(tmp_path / "run"), ckpt_path=stopped["ckpt_path"], seed=99, **settings)
    assert_same_end(whole, resumed)


def test_a_plateau_without_validation_is_refused(tmp_path, base):  # noqa: F811
    module = _module(base, lr_scheduler=lambda o: ReduceLROnPlateau(o, "val_loss"))
    with pytest.raises(ValueError, match=r"set data.validation or data.validation_fraction"):
        _trainer(tmp_path).fit(module, _loader())


@pytest.mark.parametrize(("max_steps", "max_epochs", "expected"), [(100, 2, 16), (5, 2, 5), (-1, 2, 16), (7, -1, 7)])
def test_a_schedule_comes_down_where_the_run_ends(base, tmp_path, max_steps, max_epochs, expected):  # noqa: F811
    module = _module(base, lr_schedule="linear")
    _trainer(tmp_path, max_steps=max_steps, max_epochs=max_epochs).fit(module, _loader())
    rates = [step.learning_rate for step in module.training_metrics.steps]
    assert rates == pytest.approx([0.01 * (1 - step / expected) for step in range(expected)])


class Stateful(DataLoader):
    """A loader of a user's own that can go on where it was."""

    position = 0
    loaded = None

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index >= self.position:
                type(self).position = index + 1
                yield batch
        type(self).position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        type(self).loaded = type(self).position = state["position"]


def test_counting_the_steps_of_the_epochs_loses_no_state_of_a_loader(base, tmp_path):  # noqa: F811
    def loader():
        return Stateful(_tokenized(), batch_size=1, collate_fn=collate_packed)

    path = tmp_path / "middle.ckpt"
    save = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(path))
    _trainer(tmp_path, max_steps=3, max_epochs=2, callbacks=save).fit(_module(base), loader())
    Stateful.loaded = None
    _trainer(tmp_path, max_steps=-1, max_epochs=2).fit(_module(base), loader(), ckpt_path=path)
    assert Stateful.loaded is not None


# ------------------------------------------------------------------ what loggers are told


class Told(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.told = []

    def log_hyperparams(self, params, *args):
        self.told.append(params)


@pytest.mark.parametrize("autolog", [True, False])
def test_every_logger_is_told_the_settings_once_in_plain_types(project, tmp_path, autolog):  # noqa: F811
    files = [L.pytorch.loggers.CSVLogger(tmp_path, name="csv"), PatientCSVLogger(tmp_path, name="ours")]
    loggers = [Told(), Told(), *files]
    module = LoRALightningModule(project["base"], **grouped(learning_rate=0.02, optimizer=OPTIMIZERS["RMSprop"]))
    data = SFTDataModule(project["train"], tokenizer="bytes", batch_size=3, cache_dir=tmp_path / "cache")
    trainer = _trainer(
        tmp_path, max_steps=1, logger=loggers, accumulate_grad_batches=2, enable_autolog_hparams=autolog,
        enable_checkpointing=True, plugins=[AtomicCheckpointIO()], log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    for logger in loggers[:2]:
        assert len(logger.told) == autolog
    if not autolog:
        return
    told = json.loads(json.dumps(loggers[0].told[0]))
    assert told == loggers[0].told[0] == loggers[1].told[0]
    assert (told["model"]["optimization"]["learning_rate"], told["model"]["lora"]["r"]) == (0.02, 8)
    assert (told["data"]["train"], told["data"]["batch_size"]) == (project["train"], 3)
    assert (told["trainer"]["accumulate_grad_batches"], told["trainer"]["max_steps"]) == (2, 1)
    assert (told["optimizer"]["name"], told["optimizer"]["lr"]) == ("RMSprop", 0.001)
    for name in ("csv", "ours"):
        assert yaml.safe_load((tmp_path / name / "version_0" / "hparams.yaml").read_text()) == told
    (path,) = tmp_path.rglob("*.ckpt")
    assert "hyper_parameters" not in read_checkpoint(path)
