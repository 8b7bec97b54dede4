"""Whose error an exception is: one of this package, or of a model that it tries something on.

A trial takes whatever a model raises for an answer. An error in the code that tries would be taken for one too, and
never be seen; so it is told by where it was raised.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

_HERE, _TORCH = Path(__file__).parents[1], Path(torch.__file__).parent
_INTERCEPTORS = ("__torch_function__", "__torch_dispatch__")
"""Functions of ours that stand between a model and torch."""


def raised_here(error: BaseException) -> bool:
    """Whether code of this package was the last to run, not counting torch."""
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
