"""Checkout, editable install and wheel agree on what lies where. The wheel itself is built and tried by ``.ci/run``."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import lit_lora

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def package_folder(package: str) -> Path:
    """Where pyproject.toml says that a package lies."""
    mapping, rest = SETUPTOOLS["package-dir"], []
    name = package
    while name not in mapping:
        name, _, last = name.rpartition(".")
        rest.insert(0, last)
    return ROOT.joinpath(mapping[name], *rest)


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_packages_import_from_where_pyproject_says(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__name__ == package
    assert module.__file__ is not None
    assert Path(module.__file__) == package_folder(package) / "__init__.py"


def test_every_package_folder_is_listed() -> None:
    tops = ["lit_lora", "callbacks", "configs"]
    found = {path.parent for top in tops for path in (ROOT / top).rglob("__init__.py")}
    assert found == {package_folder(package) for package in SETUPTOOLS["packages"]}


def test_bare_checkout_finds_callbacks_and_configs(tmp_path: Path) -> None:
    """With the checkout on the path and no installation (whose import hook would know the folders) to help."""
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        "import lit_lora.callbacks, lit_lora.configs;"
        "print(lit_lora.callbacks.__name__, lit_lora.callbacks.__file__, lit_lora.configs.__file__, sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    folders = [str(ROOT / folder / "__init__.py") for folder in ("callbacks", "configs")]
    assert finished.stdout.splitlines() == ["lit_lora.callbacks", *folders]


def test_configs_are_found_as_resources_and_covered_by_package_data() -> None:
    shipped = resources.files("lit_lora.configs")
    files = sorted(path for kind in ("*.yaml", "*.jsonl") for path in (ROOT / "configs").rglob(kind))
    assert len(files) >= 3
    covered = {
        path for glob in SETUPTOOLS["package-data"]["lit_lora.configs"] for path in (ROOT / "configs").glob(glob)
    }
    for path in files:
        assert shipped.joinpath(path.relative_to(ROOT / "configs").as_posix()).is_file()
        assert path in covered, f"{path.name} would be missing from the wheel: extend package-data in pyproject.toml"


def test_version_is_the_same_everywhere() -> None:
    assert lit_lora.__version__ == PROJECT["project"]["version"]


def test_constraints_pin_every_direct_dependency_within_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("torch=="), "the Makefile installs torch first"
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert len(pins) == len(lines)
    project = PROJECT["project"]
    direct = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["test"])]
    assert len(direct) >= 15
    for requirement in direct:
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier
