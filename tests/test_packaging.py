"""Checkout, editable install and wheel agree on what lies where. The wheel itself is built and tried by ``.ci/run``."""

from __future__ import annotations

import ast
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
    extras = [text for extra in project["optional-dependencies"].values() for text in extra]
    direct = [Requirement(text) for text in (*project["dependencies"], *extras)]
    assert len(direct) >= 15
    for requirement in direct:
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier


DISTRIBUTIONS = {"bitsandbytes": "bitsandbytes", "liger_kernel": "liger-kernel", "jinja2": "jinja2", "yaml": "pyyaml"}
DISTRIBUTIONS |= {"triton": "torch"}  # a part of its builds for CUDA, which runs_triton() asks for
"""Names of distributions that differ from the module's, and of those that need not be installed here."""


def test_what_is_imported_is_declared() -> None:
    """In the wheel's metadata, not only brought along by something else, or by what the tests need."""
    project = PROJECT["project"]
    extras = (project["optional-dependencies"][name] for name in ("liger", "sweep", "harness"))
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    declared = {Requirement(text).name.lower() for text in texts}
    imported: dict[str, str] = {}
    for path in [*sorted((ROOT / "lit_lora").rglob("*.py")), *sorted((ROOT / "callbacks").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0]: path.name for name in names}
    thirds = imported.keys() - sys.stdlib_module_names - {"lit_lora"}
    assert len(thirds) >= 15
    undeclared = {top: imported[top] for top in sorted(thirds) if DISTRIBUTIONS.get(top, top) not in declared}
    assert undeclared == {}


@pytest.mark.parametrize("name", ["accelerate", "bitsandbytes", "gguf", "jinja2", "jsonargparse"])
def test_what_only_transformers_and_lightning_import_for_us_is_declared(name: str) -> None:
    """Quantized weights and ``device_map`` (accelerate), GGUF files, chat templates, the command line."""
    assert name in {Requirement(text).name.lower() for text in PROJECT["project"]["dependencies"]}


def test_the_oldest_python_is_the_same_everywhere() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    for page in ("README.md", "Makefile"):
        assert f"needs only Python {oldest}+ and PyPI (or a mirror)" in (ROOT / page).read_text()
    assert f"v < ({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


def test_make_refuses_an_older_python_before_anything_is_installed(tmp_path: Path) -> None:
    """With an interpreter that only says that it is older."""
    old = tmp_path / "python3.9"
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 9)\nexec(sys.argv[2])\n")
    old.chmod(0o755)
    finished = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode != 0
    assert "is Python 3.9, lit_lora needs 3.11 or newer" in finished.stderr.splitlines()[0]
    assert not (tmp_path / "venv").exists()
