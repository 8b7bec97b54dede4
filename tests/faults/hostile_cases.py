"""What a hostile file is: what is put where, and which verb reads it. The tables are in the files after this one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults.runs import Project

MARK = "code-ran"
"""File that is made by code which must not run."""

Content = bytes | Callable[[Path], object]
"""Of a file, or what makes it."""


@dataclass(frozen=True)
class Case:
    """One hostile file."""

    kind: str
    name: str
    file: str
    """Where it lies in the folder of the case."""
    content: Content
    prepare: Callable[[Project, Path], list[str]]
    """Make the folder with everything else in it; the arguments of the command that reads it."""
    named: str
    """What the message names."""
    works: bool
    """Whether there is nothing wrong with it."""

    def put(self, folder: Path) -> None:
        """Make the file."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)


def cases(
    kind: str,
    file: str,
    prepare: Callable[[Project, Path], list[str]],
    contents: dict[str, Content],
    *,
    named: str | None = None,
    works: tuple[str, ...] = (),
) -> list[Case]:
    assert set(works) <= set(contents)
    return [
        Case(kind, name, file, content, prepare, named or Path(file).name, name in works)
        for name, content in contents.items()
    ]


# Ways to be no file, for any kind.


def pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    """A tebibyte of zeros that takes no space."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


NO_FILES: dict[str, Content] = {
    "a pipe without a writer": pipe,
    "a folder": Path.mkdir,
    "a link to itself": _loop,
    "/dev/zero": _zeros,
    "a tebibyte of zeros": huge,
    "nothing but NULs": bytes(5000),
}


def fit(project: Project, folder: Path, **settings: Any) -> list[str]:
    folder.mkdir()
    config = project.config(folder.name)
    config["data"]["cache_dir"] = str(folder / "cache")
    config["trainer"]["default_root_dir"] = str(folder / "run")
    for key, value in settings.items():
        group, _, name = key.partition("__")
        config[group][name] = value
    (folder / "sound.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(folder / "sound.yaml")]


def fit_on(file: str) -> Callable[[Project, Path], list[str]]:
    return lambda project, folder: fit(project, folder, data__train=str(folder / file))


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth
