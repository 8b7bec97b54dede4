"""Settings of a Trainer that no run can go well with, found before it is built for the run."""

from __future__ import annotations

import logging
import math
import re
import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def check_trainer(
    *,
    strategy: Any = "auto",
    precision: Any = None,
    accumulate_grad_batches: int = 1,
    gradient_clip_val: float | None = None,
    check_val_every_n_epoch: int | None = 1,
    log_every_n_steps: int | None = None,
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
        others: only numbers and strings are looked at.

    Raises:
        ValueError: for the first setting that is refused.
    """
    name = strategy if isinstance(strategy, str) else strategy.get("class_path", "") if strategy else ""
    refuse_sharding(name)
    if half := {"16-true": "float16", "bf16-true": "bfloat16"}.get(str(precision)):
        raise ValueError(
            f"precision {precision} trains adapters in {half}, whatever model.lora.adapter_dtype says, where small "
            f"updates are lost: use {str(precision).replace('true', 'mixed')}, or model.dtype {half} for the base alone"
        )
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches must be at least 1, got {accumulate_grad_batches}")
    if gradient_clip_val is not None and not 0 <= gradient_clip_val < math.inf:
        raise ValueError(f"gradient_clip_val must be at least 0 and finite, got {gradient_clip_val}")
    if check_val_every_n_epoch is not None and check_val_every_n_epoch < 1:
        raise ValueError(f"check_val_every_n_epoch must be at least 1, got {check_val_every_n_epoch}")
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


def refuse_sharding(strategy: str) -> None:
    """Check that every process will hold the whole model.

    Args:
        strategy: name or class of a Lightning strategy.

    Raises:
        ValueError: if it splits the model.
    """
    if re.search(r"fsdp|model_?parallel|deepspeed", strategy.lower()):
        raise ValueError(
            f"trainer.strategy {strategy!r} splits the model over processes, which lit_lora does not support: "
            "checkpoints of adapters only, gradients normalised by tokens, and quantized layers need whole parameters. "
            "Use 'ddp': each process holds the base (quantize it if it is too large) and they share the work"
        )
