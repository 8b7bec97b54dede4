"""Whose error an exception is: one of this package, or of a model that it tries something on.

A trial takes whatever a model raises for an answer. An error in the code that tries would be taken for one too, and
never be seen; so it is told by where it was raised.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

_HERE, _TORCH = Path(__file__).parent, Path(torch.__file__).parent
_INTERCEPTORS = ("__torch_function__", "__torch_dispatch__")
"""Functions of ours that stand between a model and torch."""


def raised_here(error: BaseException) -> bool:
    """Whether code of this package was the last to run, not counting torch."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames if frame.name not in _INTERCEPTORS]
    callers = [file for file in files if _TORCH not in file.parents]
    return bool(callers) and _HERE in callers[-1].parents


def described(error: BaseException) -> str:
    """Its kind and the first line of what it says."""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}"
