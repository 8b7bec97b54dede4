"""The state of a run beside Lightning's own: what an exact continuation needs, and what it belongs to.

Lightning keeps the optimizer, the schedule, callbacks and its counters. Here come the random state of every rank, the
gradients and sums of an unfinished accumulation window, how far the record of the metrics had come, who base and
adapters are, so that a checkpoint of another model is refused instead of loaded, and all settings, so that none changes
unsaid. Lightning's counters are made to agree with the data's position, which also moves a run between numbers of
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

import lit_lora
from lit_lora.adapters.layers import LoRALayer, adapter_modules
from lit_lora.adapters.trainable_tokens import TrainableTokens
from lit_lora.base.base_hash import base_hash, short
from lit_lora.base.held_dtype import held_dtype
from lit_lora.data.batches.resume import align_loop_progress, data_state
from lit_lora.files.checkpoint import rng_state, set_rng_state
from lit_lora.training import optimization, resume_settings
from lit_lora.training.metrics_record import MetricsRecord
from lit_lora.training.resume_settings import Difference
from lit_lora.training.step_metrics import StepRecorder, StepWindow
from lit_lora.wording import setting

KEY = "lit_lora"
"""Where all of this lies in a checkpoint."""

FORMAT = 2
"""Of what :func:`collect` returns; to be raised when it changes."""


class Identity(NamedTuple):
    """Which model a checkpoint belongs to, and how it is trained."""

    base: str
    model: nn.Module
    settings: dict[str, Any]
    """All that the module was given, plain types."""


def is_whole(trainer: Trainer) -> bool:
    """Whether no batch is under way: between batches, parameters, gradients and random state belong together."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.started == progress.processed


def collect(trainer: Trainer, identity: Identity, recorder: StepRecorder, parameters: dict[str, Any]) -> dict[str, Any]:
    """The state to save; every rank must call it.

    Args:
        trainer: between two batches.
        identity: the model.
        recorder: sums of the unfinished window, and the metrics so far, whose record is brought up to date.
        parameters: those that train, by name.

    Raises:
        RuntimeError: in the middle of a batch, whose gradients may be those of half a backward pass; or if a
            parameter holds NaN or infinity.
    """
    if trainer.training and not is_whole(trainer):
        raise RuntimeError("a batch is under way: its gradients are not whole, so there is nothing to continue from")
    broken = [name for name, p in parameters.items() if not torch.isfinite(p).all()]  # waits for the device
    if broken:
        raise RuntimeError(f"{broken[0]} holds NaN or infinity, as do {len(broken) - 1} others: not saved")
    partial = None
    if recorder.window.num_batches:
        gradients = {name: p.grad.cpu() for name, p in parameters.items() if p.grad is not None}
        partial = {"sums": recorder.window.state_dict(), "gradients": gradients}
    ranks = [{"rng": rng_state(), "window": partial}]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, ranks[0])
        ranks = gathered
    return {
        "format": FORMAT,
        "version": lit_lora.__version__,
        "base": identity.base,
        "base_hash": base_hash(identity.model).value,
        "base_dtype": _dtype_of(identity.model),
        "adapters": _adapters_of(identity.model),
        "settings": identity.settings,
        "trainer": resume_settings.trainer_settings(trainer),
        "ranks": ranks,
        "record": recorder.state_dict() if trainer.is_global_zero else {},  # what other processes collect is not saved
    }


def read(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`collect` saved.

    Raises:
        ValueError: if there is nothing of it, it is of another version, or was edited.
    """
    state = checkpoint.get(KEY)
    if not isinstance(state, dict):
        raise ValueError("this checkpoint was not written by a LoRALightningModule: it holds no base and no adapters")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint has format {state.get('format')!r} and was written by lit_lora {state.get('version')!r}, "
            f"this is lit_lora {lit_lora.__version__}, which reads format {FORMAT}: take the version that wrote it"
        )
    kinds = {"base": str, "base_hash": str, "adapters": dict, "settings": dict, "trainer": dict, "ranks": list}
    kinds |= {"record": dict, "optimizer": dict, "changes": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    point = state.get("training_point", {})
    if not isinstance(point, dict) or not all(isinstance(value, Tensor) for value in point.values()):
        wrong.append("training_point")
    if wrong:
        raise ValueError(f"the checkpoint lacks {', '.join(wrong)}: it is not as lit_lora {state['version']} writes it")
    return state


def check(
    checkpoint: dict[str, Any], identity: Identity, parameters: Mapping[str, Tensor], *, goes_on: bool
) -> tuple[dict[str, Any], list[Difference]]:
    """Check that a checkpoint belongs to this base and these adapters.

    Args:
        checkpoint: as it was read.
        identity: of the module.
        parameters: the adapters', by name.
        goes_on: whether its training is gone on with.

    Returns:
        What :func:`collect` saved, and settings that differ from it and are applied.

    Raises:
        ValueError: naming what there is no going on with.
    """
    state = read(checkpoint)
    refused, applied = resume_settings.module_differences(state["settings"], identity.settings)
    if state["adapters"] != _adapters_of(identity.model):
        lora = resume_settings.differences(
            state["settings"].get("lora", {}), _plain_lora(identity), prefix="model.lora."
        )
        began = [state["settings"].get("adapter"), identity.settings.get("adapter")]
        lora += [Difference("model.adapter", *began)] if began[0] != began[1] else []
        refused += [d for d in lora if d not in applied] or [Difference("the adapted layers", "others", "these")]
    if refused:
        raise ValueError(
            "the checkpoint's adapters differ from the configured ones: "
            + "; ".join(map(str, refused))
            + ". Set them as saved to resume, or start a new run"
        )
    began_in, now_in = state.get("base_dtype"), _dtype_of(identity.model)
    if goes_on and began_in != now_in and identity.settings.get("dtype") == "auto":
        raise ValueError(
            f"the run began with a base in {began_in}, and this machine would go on in {now_in}: set "
            f"{setting('model.dtype', began_in)}"
        )
    ours = base_hash(identity.model).value
    if state["base_hash"] != ours:
        raise ValueError(
            f"the checkpoint belongs to another base: it was trained on {state['base']!r}, "
            f"{short(state['base_hash'])}; this is {identity.base!r}, {short(ours)}, whose weights or config are not "
            "the same. Set model.base to the base that it was trained on"
        )
    if began_in != now_in:
        applied.append(Difference("dtype of the base", began_in, now_in))
    _check_keys(checkpoint["state_dict"], parameters)
    return state, applied


def _plain_lora(identity: Identity) -> dict[str, Any]:
    return json.loads(json.dumps(identity.settings["lora"]))


def _adapters_of(model: nn.Module) -> dict[str, list[Any]]:
    """What each adapted module has become, whatever names and patterns chose it."""
    return {
        name: [
            type(module).__name__,
            *((module.r, module.scaling) if isinstance(module, LoRALayer) else ()),
            *((module.token_ids,) if isinstance(module, TrainableTokens) else ()),
        ]
        for name, module in adapter_modules(model)
    }


def _dtype_of(model: nn.Module) -> str | None:
    dtype = held_dtype(model)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def restore_record(state: Mapping[str, Any], trainer: Trainer, record: MetricsRecord) -> None:
    """Go on with the metrics of the run that a checkpoint is of: from its folder, or from that of the checkpoint.

    Raises:
        ValueError: if they are not those that it was saved with.
    """
    home = Path(str(trainer.ckpt_path)).absolute().parent
    record.load_state_dict(state["record"], [Path(trainer.default_root_dir), home.parent, home])


def align(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Make Lightning's counters in a loaded checkpoint agree with the data's position, in place.

    Raises:
        ValueError: if this number of ranks cannot continue there, or it holds weights only.
    """
    if trainer.state.fn != "fit":
        return
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            f"{trainer.ckpt_path} holds weights only (ModelCheckpoint with save_weights_only), which nothing can be "
            "continued from: resume from a file that TrainingCheckpoint wrote"
        )
    _check_layout(checkpoint)
    _refuse_other_window(checkpoint[KEY], trainer)
    data: Mapping[str, Any] | None = data_state(checkpoint, trainer)
    if data is None:
        return
    loops = checkpoint["loops"]["fit_loop"]
    batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    num_batches = batches["current"]["processed"]
    in_validation = len({*validation["current"].values()}) + len({*validation["total"].values()}) > 2
    align_loop_progress(checkpoint, trainer)
    if not in_validation:
        return
    # Stopped in a validation: it is done again from its start, so that its means are whole. What Lightning takes for a
    # stop within a validation is one batch that was started and not processed.
    for counters in validation["total"], validation["current"]:
        counters.update(dict.fromkeys(counters, 0))
    validation["total"].update(ready=1, started=1)
    if (
        data["consumed"] == 0 and data["world_size"] == trainer.world_size
    ):  # at the end of an epoch, which is open until then
        for counters in loops["epoch_progress"].values():
            opened = counters["processed"]
            counters.update(ready=opened, started=opened, processed=opened - 1, completed=opened - 1)
        batches["current"].update(dict.fromkeys(batches["current"], num_batches))
        batches["is_last_batch"] = True


def layout(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of all that Lightning, callbacks and the data keep in a checkpoint, those within others after a dot."""
    parts = {name: value for name, value in checkpoint.items() if name not in (KEY, "state_dict", "optimizer_states")}
    return [name for part, value in parts.items() for name in _names(part, value)]


def _names(name: str, value: Any) -> Iterator[str]:
    yield name
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _names(f"{name}.{key}", item)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):  # not a history of numbers
        for number, item in enumerate(value):
            yield from _names(f"{name}.{number}", item)


def _check_layout(checkpoint: Mapping[str, Any]) -> None:
    """Check that all is there that was saved: what is missing, its reader would let start anew, in silence.

    Raises:
        ValueError: naming what is missing.
    """
    there = set(layout(checkpoint))
    missing = [name for name in checkpoint[KEY].get("layout", []) if name not in there]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"the checkpoint lacks {missing[0]}{more}, which was saved in it: take an undamaged one")


def given(trainer: Trainer) -> dict[str, Any]:
    """Classes and hyperparameters of the optimizer and its schedule, as they are before a checkpoint is loaded."""
    configs = trainer.lr_scheduler_configs
    return resume_settings.optimizer_settings(trainer.optimizers[0], configs[0].scheduler if configs else None)


def check_optimizer(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that the optimizer's state can be gone on with.

    Raises:
        ValueError: if the optimizer or its schedule is of another class, or has other groups.
    """
    different = [
        f"model.{name} was {saved.get(name)}, is {now[name]}"
        for name in ("optimizer", "lr_scheduler")
        if saved.get(name) != now[name]
    ]
    if len(saved.get("groups", [])) != len(now["groups"]):
        different.append(
            f"the optimizer had {len(saved.get('groups', []))} groups of parameters, has {len(now['groups'])}"
        )
    if different:
        raise ValueError(
            f"the state of the optimizer cannot be gone on with: {'; '.join(different)}. Set it as saved to resume, or "
            "start a new run"
        )


def apply_settings(state: Mapping[str, Any], trainer: Trainer, now: Mapping[str, Any]) -> list[Difference]:
    """Let what is given now hold in place of what the checkpoint brought; what of it differs.

    Args:
        state: what :func:`collect` saved.
        trainer: with the optimizer and its schedule, restored.
        now: from :func:`given`.
    """
    configs = trainer.lr_scheduler_configs
    scheduler = configs[0].scheduler if configs else None
    found = optimization.apply_given(trainer.optimizers[0], scheduler, state["optimizer"]["groups"], now["groups"])
    found = [difference._replace(name=f"model.{difference.name}") for difference in found]
    return found + resume_settings.differences(state["trainer"], resume_settings.trainer_settings(trainer))


def said(found: list[Difference], trainer: Trainer) -> list[dict[str, Any]]:
    """Say what differs from here on, and return it as an entry of the run's record; none if nothing does."""
    if not found:
        return []
    step = trainer.global_step
    rank_zero_info(f"Changed from step {step} on: {'; '.join(map(str, found))}")
    return [{"step": step, "settings": {d.name: [d.saved, d.now] for d in found}}]


def _refuse_other_window(state: Mapping[str, Any], trainer: Trainer) -> None:
    """In the middle of an accumulation window the window has to stay what it was."""
    saved = state["trainer"]
    before = saved["trainer.accumulate_grad_batches"] * saved["trainer.devices x num_nodes"]
    now = trainer.accumulate_grad_batches * trainer.world_size
    if before != now and any(entry["window"] is not None for entry in state["ranks"]):
        raise ValueError(
            f"the checkpoint lies within an optimizer step of {before} micro-batches (accumulate_grad_batches x "
            f"processes), now there are {now}: resume with as many, or from a checkpoint at the end of a step"
        )


def restore(
    state: dict[str, Any], trainer: Trainer, window: StepWindow, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Bring back the random state and the unfinished window, just before the first batch.

    Args:
        state: what :func:`collect` saved.
        trainer: tells the rank.
        window: gets the sums.
        parameters: get the gradients.
    """
    rank, ranks = trainer.global_rank, state["ranks"]
    if len(ranks) == trainer.world_size:
        set_rng_state(ranks[rank]["rng"])
        _restore_window([ranks[rank]["window"]], window, parameters)
        return
    if state["settings"]["lora"]["lora_dropout"]:
        rank_zero_warn(
            f"saved by {len(ranks)} processes and resumed by {trainer.world_size}: each process has a random stream of "
            "its own, so dropout, and with it the losses, will differ from those of an undisturbed run"
        )
    if rank == 0:  # all that was summed goes to one of them
        _restore_window([entry["window"] for entry in ranks], window, parameters)


def _restore_window(
    windows: list[dict[str, Any] | None], window: StepWindow, parameters: Mapping[str, nn.Parameter]
) -> None:
    for saved in filter(None, windows):
        window.add_state(saved["sums"])
        for name, gradient in saved["gradients"].items():
            gradient = gradient.to(parameters[name].device)
            previous = parameters[name].grad
            parameters[name].grad = gradient if previous is None else previous + gradient


def _check_keys(saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in parameters if name not in saved]
    problems += [f"unexpected {name}" for name in saved if name not in parameters]
    problems += [
        f"{name} has shape {tuple(saved[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in saved and saved[name].shape != parameter.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("the checkpoint does not fit the adapters: " + "; ".join(problems[:5]) + more)
