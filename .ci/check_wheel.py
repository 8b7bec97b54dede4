"""Run with an installed wheel, outside the checkout: every public name imports, every shipped file is found."""

from __future__ import annotations

import sys
from importlib import import_module, resources
from pathlib import Path

import lit_lora

checkout = Path(__file__).resolve().parent.parent
found_in = Path(lit_lora.__file__).resolve()
if checkout in found_in.parents and "site-packages" not in found_in.parts:
    sys.exit(f"lit_lora came from the checkout ({found_in}), expected the installed wheel")
num_names = 0
for module_name in ("lit_lora", "lit_lora.callbacks"):
    module = import_module(module_name)
    for name in module.__all__:
        getattr(module, name)
        num_names += 1
shipped = resources.files("lit_lora.configs")
missing = []
sources = sorted(p for kind in ("*.yaml", "*.jsonl") for p in (checkout / "configs").rglob(kind))
for source in sources:
    relative = source.relative_to(checkout / "configs").as_posix()
    if not shipped.joinpath(relative).is_file() or shipped.joinpath(relative).read_bytes() != source.read_bytes():
        missing.append(relative)
if missing or not sources:
    sys.exit(f"{len(missing)} of {len(sources)} files in configs/ are not in the wheel: {', '.join(missing)}")
print(
    f"wheel: {num_names} public names import, {len(sources)} configuration and data files are there ({found_in.parent})"
)
