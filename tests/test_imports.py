"""Who may import whom: the rooms of the architecture, held over the syntax tree of every file."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lit_lora
import lit_lora.callbacks

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    **{f"lit_lora.{'.'.join(p.relative_to(ROOT / 'lit_lora').with_suffix('').parts)}": p
       for p in sorted((ROOT / "lit_lora").rglob("*.py"))},
    **{f"lit_lora.callbacks.{'.'.join(p.relative_to(ROOT / 'callbacks').with_suffix('').parts)}": p
       for p in sorted((ROOT / "callbacks").rglob("*.py"))},
}  # fmt: skip

FLOORS = (
    {"files", "kernels"},
    {"batch", "config", "metrics", "wording"},
    {"base"},
    {"adapters", "data"},
    {"language_model", "rewrites", "interchange", "training"},
    {"callbacks"},
    {"build", "starting_adapter"},
    {"memory"},
    {"module", "report"},
    {"evaluation", "runs"},
    {"cli"},
    {"tools"},
    {"__main__"},
)
"""Rooms, from the ground up: each may import from the floors below it, and nothing beside or above it."""

CALLBACKS_MAY_IMPORT = {"files", "metrics", "base", "interchange"}
"""The callbacks serve other projects, and need less than what lies below them."""

MOST_FILES_ON_TOP, MOST_ROOMS = 9, 15

HEAVY = {"torch", "lightning", "pytorch_lightning", "transformers", "datasets", "bitsandbytes", "huggingface_hub"}


def room_of(module: str) -> str:
    """The folder or file below ``lit_lora`` that a module of ours is, or lies in."""
    return module.removeprefix("lit_lora.").split(".")[0]


def imported_modules(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of the modules that a file imports; a public name of lit_lora counts as the module that defines it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: relative import; write it in full"
            assert node.module is not None
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            if node.module == "lit_lora":
                submodules = {f"lit_lora.{lit_lora._PUBLIC.get(n.name, n.name)}" for n in node.names}
                found |= submodules - {"lit_lora.__version__"}
            else:
                found |= (submodules & set(FILES)) or {node.module}
    return found


def ours(modules: set[str]) -> set[str]:
    return {module for module in modules if module.startswith("lit_lora.")}


MODULES = [name for name in FILES if not name.endswith("__init__")]


def test_all_files_are_looked_at() -> None:
    assert len(MODULES) >= 30
    assert {"lit_lora.adapters.inject", "lit_lora.callbacks.verdict", "lit_lora.__main__"} <= set(MODULES)


def test_the_house_has_the_rooms_that_are_drawn() -> None:
    there = {room_of(module) for module in MODULES}
    assert there == set().union(*FLOORS)
    top = [path for path in (ROOT / "lit_lora").glob("*.py")]
    folders = [path for path in (ROOT / "lit_lora").iterdir() if (path / "__init__.py").is_file()]
    assert len(top) <= MOST_FILES_ON_TOP
    assert len(folders) <= MOST_ROOMS


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_is_below_it(module: str) -> None:
    floor = next(number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms)
    below = set().union(*FLOORS[:floor])
    for imported in sorted(ours(imported_modules(FILES[module]))):
        assert room_of(imported) in {room_of(module), *below}, f"{module} imports {imported}, which is not below it"


def test_no_two_files_of_a_room_import_each_other() -> None:
    """Nor longer circles."""
    waiting = {name: ours(imported_modules(path)) - {name} for name, path in FILES.items()}
    while waiting:
        ready = {name for name, needs in waiting.items() if not needs & waiting.keys()}
        assert ready, f"these import each other in a circle: {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}


def test_the_callbacks_are_allowed_what_they_need() -> None:
    used = {
        room_of(imported)
        for name, path in FILES.items()
        if room_of(name) == "callbacks"
        for imported in ours(imported_modules(path))
    }
    assert used - {"callbacks"} == CALLBACKS_MAY_IMPORT


def test_bare_callbacks_is_never_imported() -> None:
    files = [*FILES.values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    assert len(files) > len(FILES)
    for path in files:
        tops = {module.split(".")[0] for module in imported_modules(path)}
        assert not tops & {"callbacks", "configs"}, f"{path}: import it as lit_lora.callbacks, lit_lora.configs"


def test_only_base_weight_imports_bitsandbytes() -> None:
    users = {name for name, path in FILES.items() if "bitsandbytes" in _tops(path)}
    assert users == {"lit_lora.base.base_weight"}
    assert "bitsandbytes" not in _tops(FILES["lit_lora.base.base_weight"], top_level_only=True)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("lit_lora.callbacks.")])
def test_callbacks_need_no_more_than_lightning_and_torch(module: str) -> None:
    allowed = {"lightning", "torch", "psutil", "lit_lora", *sys.stdlib_module_names}
    assert _tops(FILES[module]) <= allowed
    rooms = {room_of(imported) for imported in ours(imported_modules(FILES[module]))}
    assert rooms <= {"callbacks", *CALLBACKS_MAY_IMPORT}


@pytest.mark.parametrize(
    "module",
    [
        "lit_lora",
        "lit_lora.config",
        "lit_lora.metrics",
        "lit_lora.files.atomic",
        "lit_lora.__main__",
        "lit_lora.tools.fetch",
        "lit_lora.cli.verb",
    ],
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.split() == []


@pytest.mark.parametrize("name", lit_lora.__all__)
def test_public_name_imports(name: str) -> None:
    assert getattr(lit_lora, name) is not None
    assert name in dir(lit_lora)


@pytest.mark.parametrize("name", lit_lora.callbacks.__all__)
def test_public_callback_imports_under_its_own_name(name: str) -> None:
    assert getattr(lit_lora.callbacks, name).__module__.startswith("lit_lora.callbacks.")


def test_type_checkers_see_what_loads_at_run_time() -> None:
    """The lazy table and the imports under TYPE_CHECKING are two lists of the same names."""
    tree = ast.parse(Path(lit_lora.__file__).read_text(encoding="utf-8"))
    branches = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    assert len(branches) == 1
    imports = [node for node in branches[0].body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {name: f"lit_lora.{module}" for name, module in lit_lora._PUBLIC.items()}


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoraConfig'"):
        importlib.import_module("lit_lora").LoraConfig  # noqa: B018


def _tops(path: Path, *, top_level_only: bool = False) -> set[str]:
    return {module.split(".")[0] for module in imported_modules(path, top_level_only=top_level_only)}
