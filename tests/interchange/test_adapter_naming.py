"""What adapters are called that are given by their folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_lora.interchange.adapter_naming import named_folders


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["runs/a/adapter", "runs/b/adapter"], ["a", "b"]),
        (["x/a/adapter", "y/a/adapter", "y/b"], ["x/a", "y/a", "b"]),
        (["runs/a/adapter", "runs/a/best_adapter"], ["a", "best_adapter"]),
        (["one=runs/a/adapter", "runs/b/adapter"], ["one", "b"]),
        (["b=runs/a/adapter", "runs/b/adapter"], ["b", "runs/b"]),
        (["lr=0.1/adapter", "lr=0.2/adapter"], ["lr=0.1", "lr=0.2"]),
        (["acme/french", "acme/poems"], ["french", "poems"]),
        (["runs/off/adapter"], ["runs/off"]),
        (["adapter/"], ["{here}"]),
        (["a/adapter", "a"], ["adapter", "a"]),
    ],
)
def test_an_adapter_is_called_after_its_run(
    given: list[str], names: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for one in given:
        folder = Path(one if one.startswith("lr=") else one.rpartition("=")[2])
        if folder.parts[0] != "acme":
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter_config.json").touch()
    assert list(named_folders(given)) == [name.format(here=tmp_path.name) for name in names]
