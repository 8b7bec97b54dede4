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
    **{f"lit_lora.callbacks.{p.stem}": p for p in sorted((ROOT / "callbacks").glob("*.py"))},
}  # fmt: skip

LEAVES = {"amounts", "config", "metrics", "atomic", "wording", "compute_limit", "environment"}
"""Rooms that every other one may import. They import nothing of ours, and neither torch nor Lightning."""

MAY_IMPORT: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "products": set(),
    "losses": {"products"},
    "blockwise_attention": {"products"},
    "attention": {"blockwise_attention"},
    "shared_prefix": {"blockwise_attention"},
    "gated_mlp": {"adapters", "whose_error"},
    "schedule": set(),
    "trainer_settings": set(),
    "activation_checkpointing": {"attention"},
    "checkpoint": set(),
    "base_hash": set(),
    "adapters": {"products", "base_hash"},
    "data.byte_tokenizer": set(),
    "tools.fetch": {"models"},
    "drift": set(),
    "whole_model": set(),
    "module_state": set(),
    "whose_error": set(),
    "valueless": {"whose_error"},
    "attention_calls": {"attention"},
    "causal_lm": {"losses", "attention", "adapters", "shared_prefix"},
    "trial_run": {"adapters", "causal_lm", "frozen_statistics", "losses", "module_state", "shared_prefix"},
    "trial": {
        "activation_checkpointing", "adapters", "attention", "attention_calls", "causal_lm", "trial_run",
        "whose_error",
    },
    "models": {"adapters", "base_hash", "data.byte_tokenizer", "whole_model"},
    "data": {"models", "data.byte_tokenizer", "data.resume", "whole_model"},
    "amounts": set(),
    "storage_tracker": set(),
    "cuda_allocator": set(),
    "memory": {
        "adapters", "models", "causal_lm", "attention", "activation_checkpointing", "storage_tracker", "cuda_allocator",
        "amounts", "build", "gated_mlp", "trial", "valueless", "whole_model",
    },
    "activation_budget": {
        "activation_checkpointing", "amounts", "causal_lm", "module_state", "storage_tracker", "valueless",
    },
    "build": {
        "activation_budget", "activation_checkpointing", "adapters", "causal_lm", "compilation", "frozen_statistics",
        "gated_mlp", "liger_kernels", "trial",
    },
    "compilation": {"activation_checkpointing", "adapters"},
    "liger_kernels": set(),
    "training_point": set(),
    "optimizer_trial": {"training_point"},
    "optimization": {"schedule", "optimizer_trial", "training_point", "resume_settings"},
    "hyperparameters": set(),
    "token_loss": {"optimizer_trial", "training_point", "step_metrics"},
    "step_metrics": set(),
    "prediction": {"data"},
    "frozen_statistics": set(),
    "data.resume": set(),
    "resume_settings": set(),
    "training_state": {
        "adapters", "base_hash", "checkpoint", "optimization", "resume_settings", "step_metrics", "data.resume",
    },
    "training_record": {"adapters"},
    "module": {
        "build", "adapters", "models", "losses", "attention", "causal_lm", "checkpoint", "activation_checkpointing",
        "compilation", "liger_kernels", "optimization", "token_loss", "training_point", "hyperparameters",
        "base_hash", "resume_settings", "trainer_settings", "step_metrics", "training_state", "training_record",
        "prediction", "frozen_statistics", "activation_budget", "amounts", "gated_mlp", "trial",
    },
    "callbacks": {"adapters", "checkpoint"},
    "tools": {
        "adapters", "models", "losses", "attention", "causal_lm", "checkpoint", "data", "memory", "drift",
        "tools.fetch", "callbacks", "module", "strict_yaml", "shipped", "prediction", "base_hash", "trial",
    },
    "csv_log": set(),
    "outcome": {"callbacks"},
    "run_folder": {"checkpoint"},
    "run_record": {"module", "base_hash", "callbacks", "checkpoint", "csv_log", "outcome"},
    "strict_yaml": set(),
    "shipped": set(),
    "synonyms": set(),
    "parse_errors": set(),
    "command_line": {"strict_yaml", "shipped"},
    "setting_check": {"command_line", "parse_errors", "strict_yaml", "synonyms"},
    "config_check": {"command_line", "data", "models", "setting_check", "shipped"},
    "cli": {
        "module", "data", "callbacks", "checkpoint", "csv_log", "outcome", "run_folder", "run_record", "config_check",
        "trainer_settings", "command_line", "parse_errors", "setting_check", "shipped", "strict_yaml",
    },
    "tools.parser": {"command_line", "parse_errors", "setting_check", "strict_yaml"},
    "tools.estimate": {"amounts", "cli", "memory", "data"},
    "__main__": {"cli", "tools", "tools.fetch", "tools.estimate", "tools.parser"},
}  # fmt: skip
"""Room -> rooms below it that it may import, beside ``LEAVES``. A room is a module or a folder; the longest name
wins."""

EXCEPTIONS = {("models", "tools.fetch")}
"""Upward on purpose: a fetched model goes by its short name wherever a base model is named. Inside a function only."""

HEAVY = {"torch", "lightning", "pytorch_lightning", "transformers", "datasets", "bitsandbytes", "huggingface_hub"}


def room_of(module: str) -> str:
    """The room that a module of ours belongs to."""
    name = module.removeprefix("lit_lora.")
    rooms = [room for room in MAY_IMPORT if name == room or name.startswith(room + ".")]
    assert rooms, f"{module} is in no room: add it to MAY_IMPORT, and to the architecture page"
    return max(rooms, key=len)


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


def test_the_rooms_form_no_circle() -> None:
    done: set[str] = set()
    while waiting := set(MAY_IMPORT) - done:
        ready = {room for room in waiting if MAY_IMPORT[room] <= done}
        assert ready, f"these rooms import each other in a circle: {sorted(waiting)}"
        done |= ready


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_is_below_it(module: str) -> None:
    room = room_of(module)
    path = FILES[module]
    for imported in sorted(ours(imported_modules(path))):
        target = room_of(imported)
        if (room, target) in EXCEPTIONS:
            assert imported not in imported_modules(path, top_level_only=True), f"{imported}: inside a function only"
            continue
        assert target in {room, *LEAVES, *MAY_IMPORT[room]}, f"{module} imports {imported}, which is not below it"


def test_bare_callbacks_is_never_imported() -> None:
    files = [*FILES.values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    assert len(files) > len(FILES)
    for path in files:
        tops = {module.split(".")[0] for module in imported_modules(path)}
        assert not tops & {"callbacks", "configs"}, f"{path}: import it as lit_lora.callbacks, lit_lora.configs"


def test_only_base_weight_imports_bitsandbytes() -> None:
    users = {name for name, path in FILES.items() if "bitsandbytes" in _tops(path)}
    assert users == {"lit_lora.adapters.base_weight"}
    assert "bitsandbytes" not in _tops(FILES["lit_lora.adapters.base_weight"], top_level_only=True)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("lit_lora.callbacks.")])
def test_callbacks_need_no_more_than_lightning_and_torch(module: str) -> None:
    allowed = {"lightning", "torch", "psutil", "lit_lora", *sys.stdlib_module_names}
    assert _tops(FILES[module]) <= allowed
    for imported in ours(imported_modules(FILES[module])):
        rooms = ("callbacks", "metrics", "adapters", "atomic", "checkpoint")
        assert imported.startswith(tuple(f"lit_lora.{room}" for room in rooms))


@pytest.mark.parametrize(
    "module",
    [
        "lit_lora",
        "lit_lora.config",
        "lit_lora.metrics",
        "lit_lora.atomic",
        "lit_lora.__main__",
        "lit_lora.tools.fetch",
        "lit_lora.tools.parser",
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
