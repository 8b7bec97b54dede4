"""Whether a path is that of an adapter, and which one was probably meant: a run folder is one level too high."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lit_lora.files.meant import closest, did_you_mean

CONFIG = "adapter_config.json"
_MAX_SHOWN = 3


def check_adapter_path(adapter: str) -> None:
    """Check that an adapter lies at a path, or may lie on the Hub under that name.

    Raises:
        FileNotFoundError: if not, saying what is there and what to give instead.
    """
    path = Path(adapter)
    if (path / CONFIG).is_file():
        return
    if path.is_file():
        hint = _of_file(path)
    elif path.is_dir():
        hint = _of_folder(path)
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", adapter) and not path.parent.is_dir():
        return
    else:
        hint = _of_nothing(path)
    raise FileNotFoundError(f"no adapter in {adapter}: {hint}")


def _of_file(path: Path) -> str:
    if path.suffix == ".ckpt":
        beside = _adapters(path.parent.parent)
        made = f"`lit-lora export {path} FOLDER` makes an adapter of it"
        return f"it is a checkpoint; {made}" + (f"; those of its run are {_listed(beside)}" if beside else "")
    if (path.parent / CONFIG).is_file():
        return f"it is a file; give its folder, {path.parent}"
    return f"it is a file, expected a folder with {CONFIG}"


def _of_folder(path: Path) -> str:
    if found := _adapters(path):
        return did_you_mean(found, most=_MAX_SHOWN)
    if checkpoints := sorted([*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")], key=_age, reverse=True):
        return f"it holds checkpoints; `lit-lora export {checkpoints[0]} FOLDER` makes an adapter of the newest"
    if (path / "config.json").is_file():
        return "it holds a model; a base is given as --base"
    return f"expected {path / CONFIG}"


def _of_nothing(path: Path) -> str:
    if found := [other for other in _adapters(Path("runs")) if other.name == path.name]:
        return did_you_mean(found, most=_MAX_SHOWN)
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    close = closest(path.name, [entry.name for entry in path.parent.iterdir()])
    if not close:
        return "there is no such folder"
    meant = path.parent / close[0]
    return did_you_mean([meant] if (meant / CONFIG).is_file() else _adapters(meant) or [meant], most=_MAX_SHOWN)


def _adapters(folder: Path) -> list[Path]:
    """Adapters in a run folder, or in the runs of a folder, the newest first."""
    found = [config.parent for depth in ("*", "*/*") for config in folder.glob(f"{depth}/{CONFIG}")]
    return sorted(found, key=_age, reverse=True)


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _listed(paths: Iterable[Path]) -> str:
    shown = [str(path) for path in paths]
    return " or ".join(shown[:_MAX_SHOWN]) + (f" (of {len(shown)})" if len(shown) > _MAX_SHOWN else "")
