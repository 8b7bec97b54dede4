"""Under which circumstances a run ran: versions, machine and data, in ``circumstances.json`` of its folder.

One entry for each start: a run that was resumed may have gone on elsewhere.
"""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lit_lora.data.datamodule import SFTDataModule
from lit_lora.files.atomic import atomic_write

CIRCUMSTANCES = "circumstances.json"
FORMAT = 1
PACKAGES = ("lit-lora", "torch", "lightning", "transformers", "bitsandbytes", "safetensors", "datasets", "numpy")


def circumstances(*, step: int, device: str, num_processes: int) -> dict[str, Any]:
    """Of this process, as an entry of the file.

    Args:
        step: optimizer steps that the run had taken when it started here.
        device: its name.
        num_processes: of the run.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "system": platform.platform(),
        "processor": processor(),
        "num_threads": torch.get_num_threads(),
        "device": device,
        "num_processes": num_processes,
    }


def add_start(folder: Path, entry: dict[str, Any], data: dict[str, Any]) -> None:
    """Add a start to the file in the folder of a run.

    Args:
        folder: of the run.
        entry: from :func:`circumstances`.
        data: what the training data are; of the newest start.

    Raises:
        OSError: if it cannot be written.
    """
    path = folder / CIRCUMSTANCES
    try:
        starts = read_circumstances(path)["starts"]
    except (OSError, ValueError):  # none yet, or damaged: this start is known
        starts = []
    text = json.dumps({"format": FORMAT, "starts": [*starts, entry], "data": data}, ensure_ascii=False, indent=1) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def described(data: Any) -> dict[str, Any]:
    """What a data module is set up with: in numbers, an example, and digests of what is trained on."""
    if not isinstance(data, SFTDataModule) or data.summary is None:
        return {}
    fingerprint = data.fingerprint()
    digests = {"training data": fingerprint["tokens"], "validation data": fingerprint["validation"]}
    return {
        "summary": data.summary.in_numbers,
        "example": data.summary.preview,
        "sha256": {name: digest for name, digest in digests.items() if digest is not None},
    }


def read_circumstances(path: Path) -> dict[str, Any]:
    """What :func:`add_start` has written.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is something else.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}")
    starts, data = content.get("starts"), content.get("data")
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError("expected a list of starts")
    if not isinstance(data, dict):
        raise ValueError("expected the data as an object")
    return content


def processor() -> str:
    """The processor's name, generation and vectors, as far as the system tells them.

    AMD calls several generations alike, which round differently, and one of which is twice as fast as another.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""  # another system than Linux
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    if "model name" not in found:
        return platform.processor() or platform.machine()
    generation = [f", {key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found]
    flags = found.get("flags", "").split()
    vectors = " (AVX512)" if "avx512f" in flags else " (AVX2)" if "avx2" in flags else ""
    return "".join([found["model name"], *generation, vectors])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
