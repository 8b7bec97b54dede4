"""Whose error an exception is: one of this package, or of a model that it tries something on.

A trial takes whatever a model raises for an answer. An error in the code that tries would be taken for one too, and
never be seen; so it is told by where it was raised.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_HERE, _TORCH = Path(__file__).parents[1], Path(torch.__file__).parent
_INTERCEPTORS = ("__torch_function__", "__torch_dispatch__")
"""Functions of ours that stand between a model and torch."""


class NotTakenError(TypeError):
    """A model, or a part of it, takes other arguments."""


def ask(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function or a module of a model, of which nobody knows what it takes.

    Python raises the error of a call that does not fit in who calls: here it would look like one of ours.

    Raises:
        NotTakenError: if it takes other arguments.
    """
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # not written in Python
        return function(*args, **kwargs)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise NotTakenError(str(error)) from None
    return function(*args, **kwargs)


def raised_here(error: BaseException) -> bool:
    """Whether code of this package was the last to run, not counting torch."""
    if isinstance(error, NotTakenError):
        return False
    raised_in = _caller(error)
    return raised_in is not None and _HERE in Path(raised_in.filename).parents


def place(error: BaseException) -> str:
    """The file and line that raised it, or that called torch, which did."""
    raised_in = _caller(error)
    return "" if raised_in is None else f"{Path(raised_in.filename).name}, line {raised_in.lineno}"


def described(error: BaseException) -> str:
    """Its kind and the first line of what it says."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"


def is_panic(error: BaseException) -> bool:
    """Whether it comes from the Rust code of tokenizers or safetensors, whose own failures are no ``Exception``."""
    return type(error).__name__ == "PanicException"


def _caller(error: BaseException) -> traceback.FrameSummary | None:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name not in _INTERCEPTORS]
    return next((frame for frame in reversed(frames) if _TORCH not in Path(frame.filename).parents), None)
