"""Settings that make no sense, and those of the Trainer that only data can show to be impossible.

They are found before a model is loaded. Lightning finds those of the Trainer when it makes its loaders: after the model
is loaded, and the validation set gone through once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_lora.wording import setting


def check_settings(
    validation_fraction: float, has_validation: bool, tokenize_workers: int | None, num_workers: int
) -> None:
    """Check numbers that make no sense, before anything is read.

    Raises:
        ValueError: naming the setting.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
    if has_validation and validation_fraction:
        raise ValueError("validation_fraction has no effect beside a validation file: set one of them")
    if tokenize_workers is not None and tokenize_workers < 1:
        raise ValueError(f"tokenize_workers must be at least 1, got {tokenize_workers}")
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")


def check_limits(trainer: Any, count_train: Callable[[], int], count_validation: Callable[[], int]) -> None:
    """Check the limits of a fit against the number of micro-batches.

    Args:
        trainer: its limits count micro-batches of this rank, as do the following.
        count_train: those of an epoch; called only where a limit needs it, since it plans an epoch.
        count_validation: those of a validation, or 0.

    Raises:
        ValueError: naming the setting, and the number of micro-batches there are.
    """
    for name, count in (("limit_train_batches", count_train), ("limit_val_batches", count_validation)):
        limit = getattr(trainer, name)
        if isinstance(limit, float) and 0 < limit < 1 and (num_batches := count()) > 0 and num_batches * limit < 1:
            raise ValueError(
                f"trainer.{name} (or overfit_batches) {limit} of {num_batches} micro-batches is none: set it to "
                f"{1 / num_batches:.3g} or more, or to a number of micro-batches"
            )
    interval = trainer.val_check_interval
    within_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches and count_validation()
    if type(interval) is int and interval > 1 and within_epoch:
        limit, num_batches = trainer.limit_train_batches, count_train()
        num_batches = min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
        if interval > num_batches:
            raise ValueError(
                f"trainer.val_check_interval {interval} is more than the {num_batches} micro-batches of an epoch: set "
                "it to as many or fewer, or trainer.check_val_every_n_epoch null to count over epochs"
            )


def check_own_sampler(trainer: Any) -> None:
    """Check that a Trainer of several processes leaves it to the data module to divide the data.

    Raises:
        ValueError: if it would put a sampler of its own in the place.
    """
    # Lightning has no public way to ask; with its own sampler in place of ours it fails later and less clearly.
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            f"the data is divided among the {trainer.world_size} ranks by SFTDataModule: "
            f"set {setting('trainer.use_distributed_sampler', False)} for the Trainer"
        )
