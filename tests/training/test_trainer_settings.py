"""What is refused of a Trainer is refused before anything is loaded, from the command line and under a Trainer of one's
own, by a line that names the setting."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch import callbacks, plugins
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lit_lora import LoRALightningModule, SFTDataModule
from lit_lora.callbacks import TrainingCheckpoint
from lit_lora.training.trainer_settings import CALLBACKS, check_trainer, missing_end


class MyAveraging(callbacks.WeightAveraging):
    """Of a user's own, derived from one of Lightning's."""


class LogsExactMatch(callbacks.Callback):
    """Of a user's own."""


BUILT = [
    ("'ModelParallelStrategy' divides adapters too.* Use 'lora_sharded'", {"strategy": ModelParallelStrategy()}),
    ("'DDPStrategy spawn' trains in processes that hand back weights", {"strategy": DDPStrategy(start_method="spawn")}),
    ("'DDPStrategy fork' trains in processes that hand back weights", {"strategy": "ddp_fork"}),
    ("bf16-true trains adapters in bfloat16", {"precision": "bf16-true"}),
    ("16-true trains adapters in float16", {"plugins": plugins.HalfPrecision("16-true")}),
    ("64-true makes base and adapters float64", {"precision": "64-true"}),
    ("LearningRateMonitor writes to a logger", {"logger": False, "callbacks": callbacks.LearningRateMonitor()}),
    ("averages the frozen base too, .* schedulefree", {"callbacks": callbacks.WeightAveraging()}),
    ("MyAveraging averages the frozen base", {"callbacks": MyAveraging()}),
    ("EMAWeightAveraging averages the frozen base", {"callbacks": callbacks.EMAWeightAveraging()}),
    ("averages nothing: use .* schedulefree", {"callbacks": callbacks.StochasticWeightAveraging(0.1)}),
    ("ModelPruning .* model.lora.r", {"callbacks": callbacks.ModelPruning("l1_unstructured")}),
    ("BackboneFinetuning trains the base", {"callbacks": callbacks.BackboneFinetuning()}),
    ("LearningRateFinder .* model.optimization.learning_rate", {"callbacks": callbacks.LearningRateFinder()}),
    ("BatchSizeFinder .* data.batch_size", {"callbacks": callbacks.BatchSizeFinder()}),
    ("set trainer.accumulate_grad_batches", {"callbacks": callbacks.GradientAccumulationScheduler({1: 2})}),
    ("SpikeDetection .* gradient_norm.spike_std", {"callbacks": callbacks.SpikeDetection()}),
    ("saves in the middle of a batch", {"callbacks": callbacks.OnExceptionCheckpoint("x")}),
    ("with save_on_exception saves in the", {"callbacks": callbacks.ModelCheckpoint(save_on_exception=True)}),
]


def test_every_callback_that_is_refused_is_tried():
    tried = {type(options["callbacks"]) for _, options in BUILT if "callbacks" in options}
    for kind in CALLBACKS:
        assert any(issubclass(one, kind) for one in tried), kind


@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=")  # from the one that saves on exceptions
@pytest.mark.parametrize(("message", "options"), BUILT)
def test_a_trainer_of_ones_own_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, message, options):
    module = LoRALightningModule("random:nothing-of-that-name")
    defaults = {"accelerator": "cpu", "devices": 1, "max_steps": 1, "default_root_dir": tmp_path}
    monkeypatch.chdir(tmp_path)  # one of them writes a file after the refusal, of nothing
    trainer = L.Trainer(**{**defaults, "logger": False, **options})
    with pytest.raises(
        (ValueError, torch.multiprocessing.ProcessRaisedException), match=f"trainer.[a-z]+: .*{message}"
    ):
        trainer.fit(module, [None], [None])
    assert module.model is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": name}, "weights only")
        for name in ("ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_notebook_find_unused_parameters_true")
    ]
    + [({"strategy": name}, "divides adapters too") for name in ("fsdp", "deepspeed_stage_2", "fsdp_cpu_offload")]
    + [({"strategy": name}, "never run on") for name in ("xla", "xla_debug", "single_tpu")]
    + [
        (
            {"strategy": Namespace(class_path="lightning.pytorch.strategies.FSDPStrategy")},
            "'FSDPStrategy' divides adapters too",
        ),
        (
            {"strategy": Namespace(class_path="x.DDPStrategy", init_args=Namespace(start_method="fork"))},
            "'DDPStrategy fork' .* weights only",
        ),
        ({"precision": "transformer-engine"}, "other layers in the place"),
        ({"precision": 64}, "precision 64 makes base and adapters float64"),
        (
            {"plugins": Namespace(class_path="x.BitsandbytesPrecision", init_args=Namespace(mode="nf4", dtype=None))},
            "BitsandbytesPrecision nf4 would quantize adapters .* model.quantization",
        ),
        ({"plugins": [Namespace(class_path="lightning.pytorch.plugins.DoublePrecision")]}, "float64"),
        ({"callbacks": Namespace(class_path="lightning.pytorch.callbacks.SpikeDetection")}, "SpikeDetection"),
        (
            {"callbacks": [Namespace(class_path="lightning.pytorch.callbacks.DeviceStatsMonitor")], "logger": False},
            "DeviceStatsMonitor writes to a logger",
        ),
        ({"barebones": True}, "trainer.num_sanity_val_steps"),
        ({"val_check_interval": 0}, "val_check_interval must be at least 1"),
        ({"min_steps": 5, "max_steps": 4}, "min_steps 5 has no effect above max_steps 4"),
        ({"min_epochs": 5, "max_epochs": 4}, "min_epochs 5 has no effect above max_epochs 4"),
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm has no effect without gradient_clip_val"),
    ],
)
def test_settings_are_refused_before_a_trainer_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        check_trainer(**options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", 32, "16", None])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "single_device"])
def test_what_works_is_not_refused(precision, strategy):
    check_trainer(precision=precision, strategy=strategy)


LATE = [
    ("trainer.val_check_interval 7 is more than the 6 micro-batches", {"val_check_interval": 7}, {}),
    ("trainer.val_check_interval 4 is more than the 3", {"val_check_interval": 4, "limit_train_batches": 3}, {}),
    ("trainer.limit_train_batches .* 0.1 of 6 micro-batches is none", {"limit_train_batches": 0.1}, {}),
    ("trainer.limit_val_batches .* 0.1 of 2 micro-batches is none", {"limit_val_batches": 0.1}, {}),
    ("trainer.limit_train_batches .* 0.1 of 6 .* 0.167 or more", {"overfit_batches": 0.1}, {}),
    ("EarlyStopping: nothing logs its monitor 'val_acc'", {"callbacks": callbacks.EarlyStopping("val_acc")}, {}),
    ("TrainingCheckpoint: nothing logs", {"callbacks": TrainingCheckpoint(monitor="loss")}, {}),
    (
        "ModelCheckpoint waits for 'val_loss', and there is no validation: set data.validation",
        {"callbacks": callbacks.ModelCheckpoint(monitor="val_loss")},
        {"validation_fraction": 0},
    ),
]


@pytest.mark.parametrize(("message", "options", "data"), LATE)
def test_what_only_the_data_can_show_is_refused_before_the_model_is_loaded(tmp_path, message, options, data):
    rows = [{"prompt": f"say {i}", "completion": "it"} for i in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"tokenizer": "bytes", "batch_size": 2, "cache_dir": tmp_path / "cache", "validation_fraction": 0.25}
    loaded = SFTDataModule(str(tmp_path / "train.jsonl"), **{**settings, **data})
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False, **options
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(LoRALightningModule("random:nothing-of-that-name"), datamodule=loaded)


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 6},
        {"val_check_interval": 7, "check_val_every_n_epoch": None},
        {"val_check_interval": 7, "limit_val_batches": 0},
        {"limit_train_batches": 0.2, "limit_val_batches": 0.5},
        {"callbacks": callbacks.EarlyStopping("train_loss")},
        {"callbacks": callbacks.EarlyStopping("grad_norm/total")},
        {"callbacks": [callbacks.EarlyStopping("exact_match"), LogsExactMatch()]},
    ],
)
def test_limits_that_the_data_can_keep_are_not_refused(tmp_path, options):
    with pytest.raises(FileNotFoundError, match="nothing-of-that-name"):
        test_what_only_the_data_can_show_is_refused_before_the_model_is_loaded(tmp_path, "refused", options, {})


def test_a_callback_that_needs_a_logger_does_so_in_a_fit_only(tmp_path):
    trainer = L.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=LearningRateMonitor())
    with pytest.raises(FileNotFoundError, match="nothing-of-that-name"):
        trainer.validate(LoRALightningModule("random:nothing-of-that-name"), [None])


def test_a_timer_is_an_end():
    none = {"max_steps": -1, "max_epochs": None, "max_time": None, "fast_dev_run": False}
    timer = Namespace(class_path="lightning.pytorch.callbacks.Timer")
    assert missing_end(**none, callbacks=timer) == missing_end(**none, callbacks=[timer]) == []
    assert "trainer.max_steps, trainer.max_epochs or trainer.max_time" in missing_end(**none, callbacks=None)[0]
