"""Configs and data that come with the package, found by name from any folder."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lit_lora.files.meant import closest, did_you_mean

FOLDER = Path(str(resources.files("lit_lora.configs")))


def shipped(name: str) -> str | None:
    """The file of that name (with or without ``configs/``) that comes with the package, where there is none here."""
    path = FOLDER / name.removeprefix("configs/")
    is_inside = ".." not in path.parts and FOLDER in path.parents
    return str(path) if is_inside and path.is_file() and not Path(name).exists() else None


def is_shipped(name: str) -> bool:
    """Whether a path is that of a file which comes with the package, and not a copy of it."""
    return FOLDER.resolve() in Path(name).resolve().parents


def similar_config(name: str) -> str:
    """What to say where there is no config of that name."""
    known = [str(path.relative_to(FOLDER)) for path in sorted(FOLDER.rglob("*.yaml"))]
    beside = [str(path) for path in sorted(Path(name).parent.glob("*.y*ml"))] if Path(name).parent.is_dir() else []
    close = closest(name.removeprefix("configs/"), [*beside, *known])
    return did_you_mean(map(Path, close)) or f"shipped are {', '.join(known)}"
