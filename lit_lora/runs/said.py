"""What a run says beside its progress and its verdict: what is about the run, and nothing else.

Lightning, transformers and we tell the user things as log records of level INFO, and by bars of tqdm. Of those,
Lightning's remarks about itself are left out, and transformers' bars where no terminal shows them. A quiet run leaves
out all of it. Warnings and errors are shown in any case.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers.utils import logging as transformers_logging

_LIGHTNING = ("lightning.pytorch", "lightning.fabric")

_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
    "lightning.fabric.utilities.seed",
)
_LEFT_OUT = (
    "💡", "`weights_only`", "GPU available: ", "TPU available: ", "LOCAL_RANK: ", "Seed set to ",
    "Initializing distributed: ", "----------", "Restoring states from ", "Restored all states from ",
    "Loading `train_dataloader` to estimate ", "`Trainer.fit` stopped: `max_",
    "You are using a CUDA device",  # and TensorFloat-32 would change the results that dtype float32 asks for
)  # fmt: skip
"""Beginnings of records that tell what the run says itself (its device, its end, where it resumes from), or what
Lightning would like to be installed."""


@contextmanager
def readable(*, quiet: bool = False) -> Iterator[None]:
    """Within, what is said is about the run.

    Args:
        quiet: leave that out, too.
    """
    with ExitStack() as stack:
        for logger in map(logging.getLogger, _LOGGERS):
            logger.addFilter(_says_something)
            stack.callback(logger.removeFilter, _says_something)
        for name in _LIGHTNING if quiet else ():
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(max(logging.WARNING, logger.level))
        liger = logging.getLogger("liger_kernel.backends.registry")
        liger.addFilter(_is_of_this_hardware)
        stack.callback(liger.removeFilter, _is_of_this_hardware)
        stack.enter_context(_bars_of_transformers(shown=not quiet))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
        yield


def _says_something(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not record.getMessage().startswith(_LEFT_OUT)


def _is_of_this_hardware(record: logging.LogRecord) -> bool:
    return "could not be imported" not in str(record.msg)  # kernels for other hardware, in liger-kernel 0.8


@contextmanager
def _bars_of_transformers(*, shown: bool) -> Iterator[None]:
    """Bars such as that of loading weights: on a terminal only, and gone when they are full."""
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)  # younger than transformers 5.0
    if set_hook is None:
        yield
        return

    def make(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*args, **{**kwargs, "disable": None if shown else True, "leave": False})

    before = set_hook(make)
    try:
        yield
    finally:
        set_hook(before)
