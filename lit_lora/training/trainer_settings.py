"""Trainer settings that cannot work, found before the model is loaded.

Two ways lead here: the command line looks at settings before anything is built (:func:`check_trainer`), and the module
looks at whatever Trainer it is given (:func:`check_built`). What is refused stands in tables, once for both.
"""

from __future__ import annotations

import importlib
import logging
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_lora.training.sharded_strategy import NAME

STRATEGIES = {
    r"fsdp|model_?parallel|deepspeed": (
        "divides adapters too, which checkpoints of adapters only and gradients normalised by tokens need whole. Use "
        f"{NAME!r}, which divides the frozen base alone, quantized or not; or 'ddp' where a process can hold all of it"
    ),
    r"spawn|fork|notebook": (
        "trains in processes that hand back weights only, so that the record and the proof of the run would be lost "
        "with them. Use 'ddp' from the command line or a script, and one device in a notebook"
    ),
    r"xla|tpu|hpu": "is for hardware that lit_lora has never run on. Use one device, or 'ddp' on CPUs and CUDA GPUs",
}
"""Pattern of a strategy -> why it is refused, and what to use."""

_HALVES = {"16": "float16", "bf16": "bfloat16"}
PRECISIONS = {
    r"(?P<bits>16|bf16)-true": (
        "trains adapters in {dtype}, whatever model.lora.adapter_dtype says, where small updates are lost: use "
        "{bits}-mixed, or model.dtype {dtype} for the base alone"
    ),
    r"\b64(-true)?$|doubleprecision": (
        "makes base and adapters float64, whatever model.dtype and model.lora.adapter_dtype say, for a loss that is "
        "computed in float32: use 32-true"
    ),
    r"transformer-?engine": (
        "puts other layers in the place of those that hold the adapters: use bf16-mixed, and model.quantization for a "
        "smaller base"
    ),
    r"bitsandbytes": "would quantize adapters and head too: use 32-true or bf16-mixed, and model.quantization",
}
"""Pattern of a precision, or of a plugin for it -> why it is refused, and what to use."""

_AVERAGE_INSTEAD = (
    "use model.optimizer schedulefree.AdamWScheduleFree, which averages the adapters while it trains, with "
    "model.optimization.lr_schedule constant"
)
CALLBACKS: dict[type[Callback], str] = {
    StochasticWeightAveraging: (
        f"copies the module before its model is loaded, and so averages nothing: {_AVERAGE_INSTEAD}"
    ),
    WeightAveraging: f"averages the frozen base too, and rounding moves it: {_AVERAGE_INSTEAD}",
    ModelPruning: (
        "looks for weights before the model is loaded: a smaller adapter is set by model.lora.r and target_modules"
    ),
    BaseFinetuning: (
        "trains the base, which is to stay as it is: see model.lora.target_modules, and model.lora.modules_to_save for "
        "modules that are to train as a whole"
    ),
    LearningRateFinder: (
        "finds a rate that the schedule then replaces: set model.optimization.learning_rate, and compare short runs"
    ),
    BatchSizeFinder: (
        "does not know what limits a batch of SFTDataModule: set data.batch_size or data.max_tokens_per_batch, and see "
        "what `lit-lora estimate` says of them"
    ),
    GradientAccumulationScheduler: (
        "changes the batch within a run, which neither the schedule nor a resume within an epoch can follow: set "
        "trainer.accumulate_grad_batches"
    ),
    SpikeDetection: (
        "takes long batches for spikes, and cannot be resumed: gradient_norm (GradientNormLogger) reports spikes of "
        "the loss per token, see gradient_norm.spike_std"
    ),
    OnExceptionCheckpoint: (
        "saves in the middle of a batch, where there is nothing to continue from: checkpoint (TrainingCheckpoint) "
        "saves what is whole when a run is stopped"
    ),
}
"""Callback of Lightning's -> why it and what derives from it is refused, and what to use."""

NEED_A_LOGGER = (LearningRateMonitor, DeviceStatsMonitor, ThroughputMonitor)


def check_trainer(
    *,
    strategy: Any = "auto",
    precision: Any = None,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    check_val_every_n_epoch: int | None = 1,
    log_every_n_steps: int | None = None,
    barebones: bool = False,
    **others: Any,
) -> None:
    """Check what a Trainer is to be built with: here what Lightning lets pass, and the rest by building one.

    Args:
        strategy: as for the Trainer, or a mapping with ``class_path``.
        precision: as for the Trainer, like all that follow.
        accumulate_grad_batches: micro-batches a step.
        gradient_clip_val: largest gradient norm or value.
        check_val_every_n_epoch: epochs between validations.
        log_every_n_steps: steps between logs.
        barebones: whether to measure the Trainer's own cost.
        others: of these, numbers and strings, and callbacks and plugins as mappings with ``class_path``.

    Raises:
        ValueError: for the first setting that is refused.
    """
    if barebones:
        raise ValueError(
            "barebones leaves out logs, checkpoints and the validation at the start, which a run is proved by: set "
            "trainer.logger, trainer.enable_checkpointing or trainer.num_sanity_val_steps for what you can do without"
        )
    has_logger = others.get("logger") is not False
    problems = [
        strategy_problem(_described(strategy)),
        precision_problem(str(precision)),
        *(precision_problem(_described(plugin)) for plugin in _listed(others.get("plugins"))),
        *(
            callback_problem(_class(callback["class_path"]), callback.get("init_args") or {}, has_logger=has_logger)
            for callback in _listed(others.get("callbacks"))
        ),
    ]
    for problem in filter(None, problems):
        raise ValueError(problem)
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
    if gradient_clip_val is not None and not 0 <= gradient_clip_val < math.inf:
        raise ValueError(f"gradient_clip_val must be at least 0 and finite, got {gradient_clip_val}")
    if check_val_every_n_epoch is not None and check_val_every_n_epoch < 1:
        raise ValueError(f"check_val_every_n_epoch must be at least 1, got {check_val_every_n_epoch}")
    if others.get("val_check_interval") == 0:
        raise ValueError("val_check_interval must be at least 1 micro-batch, or a share of an epoch above 0")
    for unit in ("steps", "epochs"):
        least, most = others.get(f"min_{unit}"), others.get(f"max_{unit}")
        if least is not None and most not in (None, -1) and least > most:
            raise ValueError(f"min_{unit} {least} has no effect above max_{unit} {most}")
    if others.get("max_time") is not None and _has_timer(others.get("callbacks")):
        raise ValueError("max_time has no effect beside a Timer in trainer.callbacks: leave one of them out")
    if others.get("gradient_clip_algorithm") is not None and not gradient_clip_val:
        raise ValueError("gradient_clip_algorithm has no effect without gradient_clip_val")
    if log_every_n_steps is not None and log_every_n_steps < 0:
        raise ValueError(f"log_every_n_steps must not be negative, got {log_every_n_steps}")
    plain = {key: value for key, value in others.items() if isinstance(value, (str, int, float))}
    if isinstance(strategy, str):
        plain |= {"strategy": strategy}
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what it says about the hardware comes again
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(**{**plain, "precision": precision, "gradient_clip_val": gradient_clip_val, "logger": False})
    except (MisconfigurationException, TypeError) as error:
        raise ValueError(str(error)) from error
    finally:
        logging.disable(disabled)


def check_built(trainer: Trainer) -> None:
    """Check the Trainer that a module has been given.

    Raises:
        ValueError: for the first setting that is refused.
    """
    strategy, plugin, callbacks = trainer.strategy, trainer.precision_plugin, trainer.callbacks  # type: ignore[attr-defined]
    has_logger = bool(trainer.loggers) or trainer.state.fn != "fit"
    problems = {
        "strategy": [
            strategy_problem(" ".join([type(strategy).__name__, getattr(strategy, "_start_method", None) or ""]))
        ],
        "precision": [precision_problem(f"{type(plugin).__name__} {plugin.precision}")],
        "callbacks": [callback_problem(type(each), vars(each), has_logger=has_logger) for each in callbacks],
    }
    for setting, found in problems.items():
        for problem in filter(None, found):
            raise ValueError(f"trainer.{setting}: {problem}")


def check_monitors(trainer: Trainer, logged: Collection[str]) -> None:
    """Check what callbacks of Lightning's and ours wait for, once it is known whether there is validation data.

    Args:
        trainer: with its callbacks.
        logged: what the module logs; a name with a slash is some callback's, and other people's may log any.

    Raises:
        ValueError: if a callback waits for a metric that nobody logs.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    known = [callback for callback in callbacks if type(callback).__module__.startswith(("lightning.", "lit_lora."))]
    for callback in known:
        kind, monitor = type(callback).__name__, getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or "/" in monitor or monitor.startswith("lr-"):
            continue
        if monitor not in logged and len(known) == len(callbacks):
            raise ValueError(f"{kind}: nothing logs its monitor {monitor!r}; set it to one of {', '.join(logged)}")
        if (
            isinstance(callback, (EarlyStopping, ModelCheckpoint))
            and monitor.startswith("val_")
            and not trainer.enable_validation
        ):
            raise ValueError(
                f"{kind} waits for {monitor!r}, and there is no validation: set data.validation or "
                "data.validation_fraction, or its monitor to train_loss"
            )


def missing_end(
    *, max_steps: int, max_epochs: int | None, max_time: Any, fast_dev_run: int | bool, callbacks: Any, **others: Any
) -> list[str]:
    """What is wrong with a Trainer for ``fit`` whose settings name no end: Lightning would take 1000 epochs.

    Args:
        max_steps: as for the Trainer, like all that follow.
        max_epochs: -1 asks for a run without end.
        max_time: None where there is none.
        fast_dev_run: has an end of its own.
        callbacks: mappings with ``class_path``; a Timer among them is an end.
        others: not looked at.
    """
    if max_steps != -1 or max_epochs is not None or max_time is not None or fast_dev_run or _has_timer(callbacks):
        return []
    return [
        "trainer: nothing says when the run ends: set trainer.max_steps, trainer.max_epochs or trainer.max_time "
        "(trainer.max_epochs -1 for a run that is stopped by hand)"
    ]


def strategy_problem(strategy: str) -> str | None:
    """Why some process would not hold the whole model, or not be there at the end, and what to use instead.

    Args:
        strategy: name or class of a Lightning strategy, and how it starts processes.
    """
    for pattern, reason in STRATEGIES.items():
        if re.search(pattern, strategy.lower()):
            return f"{strategy.strip()!r} {reason}"
    return None


def precision_problem(precision: str) -> str | None:
    """Why adapters would not keep their dtype or their layers, and what to use instead.

    Args:
        precision: its name; or the class of a plugin for one, with what it was built with.
    """
    for pattern, reason in PRECISIONS.items():
        if found := re.search(pattern, precision.lower()):
            bits = found.groupdict().get("bits") or ""
            return f"precision {precision} " + reason.format(bits=bits, dtype=_HALVES.get(bits, ""))
    return None


def callback_problem(kind: type[Callback], settings: Mapping[str, Any], *, has_logger: bool) -> str | None:
    """Why a callback cannot work on adapters over a base that is frozen and loaded late, and what to use instead.

    Args:
        kind: class of the callback.
        settings: what it was or will be built with.
        has_logger: whether there is a logger to write to.
    """
    for refused, reason in CALLBACKS.items():
        if issubclass(kind, refused):
            return f"{kind.__name__} {reason}"
    if issubclass(kind, ModelCheckpoint) and settings.get("save_on_exception"):
        return f"{kind.__name__} with save_on_exception {CALLBACKS[OnExceptionCheckpoint]}"
    if issubclass(kind, NEED_A_LOGGER) and not has_logger:
        return f"{kind.__name__} writes to a logger, and there is none: set trainer.logger, or leave it out"
    return None


def _has_timer(callbacks: Any) -> bool:
    return any(issubclass(_class(callback["class_path"]), Timer) for callback in _listed(callbacks))


def _described(given: Any) -> str:
    """A name; or the class of a mapping with ``class_path``, and its arguments."""
    if not isinstance(given, (Mapping, Namespace)):
        return str(given)
    arguments = given.get("init_args") or {}
    return " ".join(
        [
            given["class_path"].rpartition(".")[2],
            *(str(value) for value in dict(arguments).values() if value is not None),
        ]
    )


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
