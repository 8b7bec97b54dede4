"""What the matrix combines, what is refused, and which pairs are: one table each, which the documentation repeats."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.matrix.pairwise import Row, pairwise

Options = dict[str, Any]
"""Settings by their full name."""


def _callback(name: str, **arguments: Any) -> Options:
    return {"trainer.callbacks": [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}]}


def _optimizer(path: str, **arguments: Any) -> Options:
    return {"model.optimizer": {"class_path": path, "init_args": {"lr": 0.01, **arguments}}}


def _schedule(path: str, **arguments: Any) -> Options:
    return {"model.lr_scheduler": {"class_path": path, "init_args": arguments}}


_SCALED = {
    "class_path": "lightning.pytorch.plugins.MixedPrecision",
    "init_args": {"precision": "16-mixed", "device": "cpu"},  # by itself, Lightning takes bf16-mixed on a CPU
}
_CSV = "lightning.pytorch.loggers.CSVLogger"

COLUMNS: dict[str, dict[str, Options]] = {
    "optimizer": {
        "AdamW": {},
        "SGD": _optimizer("torch.optim.SGD", momentum=0.9),
        "Adafactor (torch)": _optimizer("torch.optim.Adafactor"),
        "Adafactor (transformers)": _optimizer(
            "transformers.optimization.Adafactor", relative_step=False, scale_parameter=False
        ),
        "AdamW8bit (bitsandbytes)": _optimizer("bitsandbytes.optim.AdamW8bit"),
        "AdamWScheduleFree": _optimizer("schedulefree.AdamWScheduleFree"),
    },
    "callbacks": {
        "none": {},
        "EarlyStopping": _callback("EarlyStopping", monitor="val_loss", patience=1000),
        "ModelCheckpoint": _callback("ModelCheckpoint", monitor="val_loss", save_top_k=2),
        "LearningRateMonitor": _callback("LearningRateMonitor", logging_interval="step"),
        "Timer": _callback("Timer", duration="00:01:00:00"),
        "RichModelSummary": _callback("RichModelSummary"),
        "DeviceStatsMonitor": _callback("DeviceStatsMonitor"),
    },
    "schedule": {
        "constant": {"model.optimization.lr_schedule": "constant"},
        "cosine": {"model.optimization.lr_schedule": "cosine"},
        "linear": {"model.optimization.lr_schedule": "linear", "model.optimization.warmup_ratio": 0.2},
        "ReduceLROnPlateau": _schedule("lightning.pytorch.cli.ReduceLROnPlateau", monitor="val_loss", patience=0),
        "OneCycleLR": _schedule(
            "torch.optim.lr_scheduler.OneCycleLR", max_lr=0.01, total_steps=6, cycle_momentum=False
        ),
        "CosineAnnealingWarmRestarts": _schedule("torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", T_0=3),
    },
    "end": {
        "max_steps": {"trainer.max_steps": 6},
        "max_epochs": {"trainer.max_epochs": 2, "trainer.max_steps": 100},
        "max_time": {"trainer.max_time": "00:00:00:01"},
    },
    "precision": {
        "32-true": {},
        "bf16-mixed": {"trainer.precision": "bf16-mixed"},
        "16-mixed": {"trainer.plugins": [_SCALED]},
    },
    "clipping": {
        "none": {},
        "norm": {"trainer.gradient_clip_val": 1.0},
        "value": {"trainer.gradient_clip_val": 0.5, "trainer.gradient_clip_algorithm": "value"},
    },
    "accumulation": {"1": {}, "3": {"trainer.accumulate_grad_batches": 3}},
    "strategy": {"auto": {}, "ddp": {"trainer.strategy": "ddp", "trainer.devices": 1}},
    "logger": {
        "ours": {},
        "none": {"trainer.logger": False},
        "two of Lightning's": {
            "trainer.logger": [
                {"class_path": _CSV, "init_args": {"save_dir": "{folder}", "name": name}} for name in ("one", "two")
            ]
        },
    },
    "base": {
        "full precision": {},
        "4 bits": {"model.quantization.bits": 4},
        "8 bits": {"model.quantization.bits": 8},
    },
    "dropout": {"0": {}, "0.1": {"model.lora.lora_dropout": 0.1}},
    "batches": {"packed": {}, "padded": {"data.packing": False}},
    "checkpoints": {"on": {"checkpoint.every_n_steps": 1}, "off": {"trainer.enable_checkpointing": False}},
    "run": {"undisturbed": {}, "killed and resumed": {}},
}
"""Column -> value -> what sets it. Whatever is no refused pair works."""


ALONE: dict[str, Options] = {
    "logger: true": {"trainer.logger": True},
    "fast_dev_run: 3": {"trainer.fast_dev_run": 3},
    "overfit_batches: 3": {"trainer.overfit_batches": 3, "trainer.val_check_interval": 1.0},
    "limit_train_batches: 0.5": {"trainer.limit_train_batches": 0.5},
    "limit_val_batches: 0": {"trainer.limit_val_batches": 0},
    "num_sanity_val_steps: 0": {"trainer.num_sanity_val_steps": 0},
    "val_check_interval: 0.5": {"trainer.val_check_interval": 0.5},
    "check_val_every_n_epoch: null": {"trainer.check_val_every_n_epoch": None, "trainer.val_check_interval": 5},
    "reload_dataloaders_every_n_epochs: 1": {"trainer.reload_dataloaders_every_n_epochs": 1, "trainer.max_epochs": 2},
    "min_epochs: 1": {"trainer.min_epochs": 1, "trainer.max_epochs": 2},
    "detect_anomaly: true": {"trainer.detect_anomaly": True},
    "deterministic: true": {"trainer.deterministic": True},
    "benchmark: true": {"trainer.benchmark": True},
    "inference_mode: false": {"trainer.inference_mode": False},
    "use_distributed_sampler: true, one process": {"trainer.use_distributed_sampler": True},
    "sync_batchnorm: true": {"trainer.sync_batchnorm": True},
    "profiler: simple": {"trainer.profiler": "simple"},
    "profiler: advanced": {"trainer.profiler": "advanced"},
    "enable_model_summary: true": {"trainer.enable_model_summary": True},
    "enable_autolog_hparams: false": {"trainer.enable_autolog_hparams": False},
    "model_registry: name": {"trainer.model_registry": "name"},
    "one callback, not in a list": {"trainer.callbacks": _callback("LambdaCallback")["trainer.callbacks"][0]},
    "callbacks: RichProgressBar": {**_callback("RichProgressBar"), "trainer.enable_progress_bar": True},
    "callbacks: ThroughputMonitor": _callback("ThroughputMonitor", batch_size_fn="operator.length_hint"),
    "strategy: single_device": {"trainer.strategy": "single_device"},
    "strategy: lora_sharded, one process": {"trainer.strategy": "lora_sharded", "trainer.devices": 1},
    "strategy: ddp_find_unused_parameters_true": {
        "trainer.strategy": "ddp_find_unused_parameters_true",
        "trainer.devices": 1,
    },
    "strategy: DDPStrategy(static_graph=True)": {
        "trainer.strategy": {
            "class_path": "lightning.pytorch.strategies.DDPStrategy",
            "init_args": {"static_graph": True},
        }
    },
}
"""Setting that works -> what sets it."""

KILLED_ALONE = {"overfit_batches: 3", "limit_train_batches: 0.5", "check_val_every_n_epoch: null",
                "reload_dataloaders_every_n_epochs: 1"}  # fmt: skip
"""Those that change what is trained on when: a run with them is killed and resumed, too."""


class Refused(NamedTuple):
    """A setting, or two together, that no run can go well with."""

    what: str
    why: str
    """What the error says, from some place on."""
    options: Options


_AVERAGES = "schedulefree.AdamWScheduleFree, which averages the adapters while it trains"
_WEIGHTS_ONLY = "trains in processes that hand back weights only"
_SPLITS = "Use 'lora_sharded', which divides the frozen base alone"
_NO_LOGGER = "writes to a logger, and there is none: set trainer.logger"

REFUSED = [
    Refused("precision 16-true", "use 16-mixed, or model.dtype float16", {"trainer.precision": "16-true"}),
    Refused("precision bf16-true", "use bf16-mixed, or model.dtype bfloat16", {"trainer.precision": "bf16-true"}),
    Refused(
        "precision 64-true", "for a loss that is computed in float32: use 32-true", {"trainer.precision": "64-true"}
    ),
    Refused(
        "precision transformer-engine",
        "puts other layers in the place of those that hold the adapters",
        {"trainer.precision": "transformer-engine"},
    ),
    Refused(
        "BitsandbytesPrecision",
        "would quantize adapters and head too",
        {
            "trainer.plugins": {
                "class_path": "lightning.pytorch.plugins.BitsandbytesPrecision",
                "init_args": {"mode": "nf4"},
            }
        },
    ),
    Refused("strategy ddp_spawn", _WEIGHTS_ONLY, {"trainer.strategy": "ddp_spawn"}),
    Refused("strategy ddp_fork", _WEIGHTS_ONLY, {"trainer.strategy": "ddp_fork"}),
    Refused("strategy ddp_notebook", _WEIGHTS_ONLY, {"trainer.strategy": "ddp_notebook"}),
    Refused("strategy fsdp", _SPLITS, {"trainer.strategy": "fsdp"}),
    Refused("strategy deepspeed", _SPLITS, {"trainer.strategy": "deepspeed_stage_2"}),
    Refused("strategy xla", "is for hardware that lit_lora has never run on", {"trainer.strategy": "xla"}),
    Refused("StochasticWeightAveraging", _AVERAGES, _callback("StochasticWeightAveraging", swa_lrs=0.1)),
    Refused("WeightAveraging", _AVERAGES, _callback("WeightAveraging")),
    Refused("EMAWeightAveraging", _AVERAGES, _callback("EMAWeightAveraging")),
    Refused(
        "ModelPruning",
        "a smaller adapter is set by model.lora.r",
        _callback("ModelPruning", pruning_fn="l1_unstructured"),
    ),
    Refused("BackboneFinetuning", "trains the base, which is to stay as it is", _callback("BackboneFinetuning")),
    Refused("LearningRateFinder", "finds a rate that the schedule then replaces", _callback("LearningRateFinder")),
    Refused("BatchSizeFinder", "set data.batch_size or data.max_tokens_per_batch", _callback("BatchSizeFinder")),
    Refused(
        "GradientAccumulationScheduler",
        "neither the schedule nor a resume within an epoch can follow",
        _callback("GradientAccumulationScheduler", scheduling={0: 1, 1: 2}),
    ),
    Refused("SpikeDetection", "takes long batches for spikes, and cannot be resumed", _callback("SpikeDetection")),
    Refused("OnExceptionCheckpoint", "saves in the middle of a batch", _callback("OnExceptionCheckpoint", dirpath="x")),
    Refused(
        "ModelCheckpoint with save_on_exception",
        "saves in the middle of a batch",
        _callback("ModelCheckpoint", save_on_exception=True),
    ),
    Refused("optimizer LBFGS", "evaluates the batch", _optimizer("torch.optim.LBFGS")),
    Refused(
        "optimizer SparseAdam", "SparseAdam does not support dense gradients", _optimizer("torch.optim.SparseAdam")
    ),
    Refused(
        "optimizer Adafactor (transformers) without lr",
        "has no learning rate of its own",
        {"model.optimizer": {"class_path": "transformers.optimization.Adafactor"}},
    ),
    Refused(
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "use lightning.pytorch.cli.ReduceLROnPlateau, with monitor val_loss",
        _schedule("torch.optim.lr_scheduler.ReduceLROnPlateau"),
    ),
    Refused("barebones", "leaves out logs, checkpoints and the validation at the start", {"trainer.barebones": True}),
    Refused("no end", "set trainer.max_steps, trainer.max_epochs or trainer.max_time", {"trainer.max_steps": -1}),
    Refused(
        "val_check_interval above the batches of an epoch",
        "micro-batches of an epoch",
        {"trainer.val_check_interval": 99},
    ),
    Refused(
        "gradient_clip_algorithm without gradient_clip_val",
        "has no effect",
        {"trainer.gradient_clip_algorithm": "norm"},
    ),
]

Value = tuple[str, str]

REFUSED_PAIRS: dict[frozenset[Value], str] = {
    frozenset(
        {("optimizer", "AdamWScheduleFree"), ("schedule", "cosine")}
    ): "set model.optimization.lr_schedule constant",
    frozenset(
        {("optimizer", "AdamWScheduleFree"), ("schedule", "linear")}
    ): "set model.optimization.lr_schedule constant",
    frozenset({("end", "max_time"), ("schedule", "cosine")}): "comes down towards an end in steps, and none is known",
    frozenset({("end", "max_time"), ("schedule", "linear")}): "comes down towards an end in steps, and none is known",
    frozenset({("end", "max_time"), ("schedule", "OneCycleLR")}): "OneCycleLR has 6 steps, and the run no end in steps",
    frozenset({("end", "max_time"), ("callbacks", "Timer")}): "max_time has no effect beside a Timer",
    frozenset({("callbacks", "LearningRateMonitor"), ("logger", "none")}): f"LearningRateMonitor {_NO_LOGGER}",
    frozenset({("callbacks", "DeviceStatsMonitor"), ("logger", "none")}): f"DeviceStatsMonitor {_NO_LOGGER}",
    frozenset({("callbacks", "ModelCheckpoint"), ("checkpoints", "off")}): (
        "Trainer was configured with `enable_checkpointing=False` but found `ModelCheckpoint`"
    ),
}
"""Two values that each work -> what the error says of them together."""

NOT_TRIED = {
    frozenset(
        {("end", "max_epochs"), ("schedule", "OneCycleLR")}
    ): "refused, after the model is loaded: it has 6 steps",
    frozenset({("run", "killed and resumed"), ("checkpoints", "off")}): "there is nothing to resume from",
    frozenset({("run", "killed and resumed"), ("end", "max_time")}): "ends at another step each time",
}
"""Pairs that stand in no row -> why."""


def allowed(row: Row) -> bool:
    """Whether the values can stand in one row."""
    return not any(pair <= row.items() for pair in (*REFUSED_PAIRS, *NOT_TRIED))


ROWS = pairwise({name: [*values] for name, values in COLUMNS.items()}, allowed)


def options_of(row: Row) -> Options:
    """All that a row sets."""
    return {key: value for column, name in row.items() for key, value in COLUMNS[column][name].items()}
