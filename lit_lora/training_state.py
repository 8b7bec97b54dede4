"""The state of a run beside Lightning's own: what an exact continuation needs, and what it belongs to.

Lightning keeps the optimizer, the schedule, callbacks and its counters. Here come the random state of every rank, the
gradients and sums of an unfinished accumulation window, the metrics so far, and who base and adapters are, so that a
checkpoint of another model is refused instead of loaded. Lightning's counters are made to agree with the data's
position, which also moves a run between numbers of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_lora.checkpoint import base_fingerprint, describe_mismatch, rng_state, set_rng_state
from lit_lora.config import LoRAConfig, QuantizationConfig
from lit_lora.data.resume import DATA_STATE_KEY, align_loop_progress
from lit_lora.step_metrics import StepRecorder, StepWindow

KEY = "lit_lora"
"""Where all of this lies in a checkpoint."""

_STRUCTURE = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
)


class Identity(NamedTuple):
    """Which model a checkpoint belongs to."""

    base: str
    model: nn.Module
    lora: LoRAConfig
    quantization: QuantizationConfig | None


def is_whole(trainer: Trainer) -> bool:
    """Whether no batch is under way: between batches, parameters, gradients and random state belong together."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.started == progress.processed


def collect(
    trainer: Trainer, identity: Identity, settings: dict[str, Any], recorder: StepRecorder, parameters: dict[str, Any]
) -> dict[str, Any]:
    """The state to save; every rank must call it.

    Args:
        trainer: between two batches.
        identity: the model.
        settings: what builds the module again.
        recorder: sums of the unfinished window, and the metrics so far.
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
        "base": identity.base,
        "base_fingerprint": base_fingerprint(identity.model),
        "settings": settings,
        "ranks": ranks,
        "metrics": recorder.flush().state_dict(),
    }


def check(checkpoint: dict[str, Any], identity: Identity, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """Check that a checkpoint belongs to this base and these adapters.

    Returns:
        What :func:`collect` saved.

    Raises:
        ValueError: naming what differs.
    """
    state = checkpoint.get(KEY)
    if not isinstance(state, dict):
        raise ValueError("this checkpoint was not written by a LoRALightningModule: it holds no base and no adapters")
    settings = state["settings"]
    lora = asdict(identity.lora)
    differences = describe_mismatch(
        {name: settings["lora"].get(name) for name in _STRUCTURE}, {name: lora[name] for name in _STRUCTURE}
    )
    quantization = asdict(identity.quantization) if identity.quantization is not None else None
    differences += describe_mismatch({"quantization": settings["quantization"]}, {"quantization": quantization})
    if differences:
        raise ValueError(
            "the checkpoint's adapters differ from the configured ones: "
            + "; ".join(differences)
            + ". Set them as saved to resume, or start a new run"
        )
    if state["base_fingerprint"] != base_fingerprint(identity.model):
        raise ValueError(
            f"the checkpoint belongs to another base: it was trained on {state['base']!r}, this is {identity.base!r} "
            "with other weights. Set model.base to the base that it was trained on"
        )
    _check_keys(checkpoint["state_dict"], parameters)
    return state


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
            "continued from: resume from a file that TrainingCheckpoint wrote, step=NUMBER.ckpt"
        )
    if DATA_STATE_KEY not in checkpoint:
        return
    loops = checkpoint["loops"]["fit_loop"]
    batches, validation = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    num_batches = batches["current"]["processed"]
    in_validation = len({*validation["current"].values()}) + len({*validation["total"].values()}) > 2
    align_loop_progress(checkpoint, trainer.world_size)
    if not in_validation:
        return
    # Stopped in a validation: it is done again from its start, so that its means are whole. What Lightning takes for a
    # stop within a validation is one batch that was started and not processed.
    for counters in validation["total"], validation["current"]:
        counters.update(dict.fromkeys(counters, 0))
    validation["total"].update(ready=1, started=1)
    same_ranks = checkpoint[DATA_STATE_KEY]["world_size"] == trainer.world_size
    if checkpoint[DATA_STATE_KEY]["consumed"] == 0 and same_ranks:  # at the end of an epoch, which is open until then
        for counters in loops["epoch_progress"].values():
            opened = counters["processed"]
            counters.update(ready=opened, started=opened, processed=opened - 1, completed=opened - 1)
        batches["current"].update(dict.fromkeys(batches["current"], num_batches))
        batches["is_last_batch"] = True


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
