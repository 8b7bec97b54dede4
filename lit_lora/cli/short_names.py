"""Options of ``fit`` by short names, for the verbs that look at a model and a data file: ``--format``, ``--model``."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable

from lit_lora.cli.command_line import Option
from lit_lora.cli.setting_check import refuse
from lit_lora.files.meant import closest, did_you_mean

_OF_THE_MODEL = {"model": "model.base", "base": "model.base"} | {
    name: f"model.{name}" for name in ("revision", "trust_remote_code")
}
FLAGS = ("--trust_remote_code",)
"""Of these names, those that need no value."""


def short_names() -> dict[str, str]:
    """The setting that each short name stands for."""
    from lit_lora.data.datamodule import SFTDataModule

    return _OF_THE_MODEL | {name: f"data.{name}" for name in inspect.signature(SFTDataModule).parameters}


def as_for_fit(given: Iterable[Option], own: Collection[str]) -> list[str]:
    """The options by their names for ``fit``: ``--format`` is ``--data.format``.

    Args:
        given: on the command line, for ``fit``.
        own: options of the verb itself, which may have been meant.

    Raises:
        SystemExit: for a name that is nearly one of these.
    """
    keys = short_names()
    known = [*own, *keys]
    tokens: list[str] = []
    for option in given:
        if option.key in keys:
            tokens.append(f"--{keys[option.key]}" + ("" if option.value is None else f"={option.value}"))
        elif "." not in option.key and option.key != "config" and (close := closest(option.key, known, cutoff=0.8)):
            refuse([f"no option --{option.key}, {did_you_mean(f'--{name}' for name in close)}"])
        else:
            tokens += option.tokens
    return tokens
