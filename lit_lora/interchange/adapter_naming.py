"""What several adapters are called: as they are given, ``french=runs/a/adapter``, or after their runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_lora.interchange.adapter_path import CONFIG

RESERVED = ("on", "off", "__base__")
"""Words for the base alone, and for the adapter that was active before."""

_IN_EVERY_RUN = "adapter"
"""Folder of a run that holds its adapter: the run's own name says more."""


def named_folders(given: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Name -> folder or id on the Hub, in the order in which they are given.

    Args:
        given: folders, each perhaps after a name and an equals sign; or folders by name.

    Raises:
        ValueError: for a name that cannot be one or is given twice, a folder that is given twice, or no folder.
    """
    pairs = given.items() if isinstance(given, Mapping) else map(_divided, given)
    wanted = [(name, str(folder)) for name, folder in pairs]
    if not wanted or not all(folder for _, folder in wanted):
        raise ValueError("expected the folder of an adapter, got none")
    check_given_once([folder for _, folder in wanted])
    names = [name for name, _ in wanted if name is not None]
    for own in names:
        if own in RESERVED or not re.fullmatch(r"[^\s=/]+", own):
            raise ValueError(
                f"{own!r} cannot be the name of an adapter: expected a word without '=' and '/' that is none of "
                f"{', '.join(RESERVED)}"
            )
        if names.count(own) > 1:
            raise ValueError(f"two adapters are called {own!r}: give each a name of its own")
    labels = {folder: _labels(folder) for name, folder in wanted if name is None}
    found: dict[str, str] = {}
    for name, folder in wanted:
        others = {label for other in labels if other != folder for label in labels[other]} | {*names, *RESERVED}
        found[name or next((label for label in labels[folder] if label not in others), folder)] = folder
    return found


def check_given_once(folders: Sequence[str]) -> None:
    """Refuse a folder that is given twice, however it is written.

    Raises:
        ValueError: naming it.
    """
    seen: dict[tuple[str, ...], str] = {}
    for number, folder in enumerate(folders):
        same = seen.setdefault(_parts(folder), folder)
        if len(seen) <= number:
            raise ValueError(f"an adapter is named twice: {same} and {folder} are one; give it once")


def _divided(given: str) -> tuple[str | None, str]:
    """Name and folder; a folder may have an equals sign in its own name."""
    name, sign, folder = given.partition("=")
    return (name, folder) if sign and "/" not in name and not (Path(given) / CONFIG).is_file() else (None, given)


def _parts(folder: str) -> tuple[str, ...]:
    """Of where it lies; of an id on the Hub."""
    path = Path(folder).expanduser()
    return path.resolve().parts if path.exists() else path.parts


def _labels(folder: str) -> list[str]:
    """What a folder can be called, the shortest first."""
    path = Path(folder).expanduser()
    parts = [part for part in (path.absolute() if path.exists() else path).parts if part != path.anchor]
    parts = parts or [folder]
    run = parts[:-1] if parts[-1] == _IN_EVERY_RUN and len(parts) > 1 else parts
    return ["/".join(of[-count:]) for of in (run, parts) for count in range(1, len(of) + 1)]
