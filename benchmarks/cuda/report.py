"""What the CUDA suite writes: per part a CSV, and a markdown file with device, versions, date, command and a table."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.cuda.worker import Row

PACKAGES = ("torch", "transformers", "lightning", "peft", "bitsandbytes", "accelerate", "liger-kernel", "triton")
ONLY_IN_CSV = {"longest_kernels"}
DIGITS = {
    "_mb": 0,
    "_ms": 1,
    "_s": 4,
    "_per_s": 0,
    "tflops": 1,
    "_error": 4,
    "ratio": 2,
    "of_lora": 3,
    "share": 3,
    "loss": 4,
}
"""End of a column's name -> digits that it is written with; the first that fits, longest first."""


def facts(settings: Row) -> Row:
    """Device, driver, versions and the size of a CUDA context, which only a process that starts CUDA can tell."""
    import torch

    found: Row = {"versions": versions(), "python": platform.python_version(), "processor": platform.machine()}
    found |= {"cpus": os.cpu_count(), "device": f"CPU, {platform.processor() or platform.machine()}"}
    if settings["device"] != "cuda":
        return {**found, "context_bytes": 0}
    properties = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    return {
        **found,
        "device": f"{properties.name}, {total / 1e9:.1f} GB, compute capability {properties.major}.{properties.minor}",
        "driver": driver(),
        "cuda": torch.version.cuda,
        "context_bytes": total - free,
    }


def versions() -> dict[str, str]:
    """Of the packages that matter; those that are missing say so."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def driver() -> str:
    """Version of NVIDIA's driver, or why it is not known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return f"unknown ({type(error).__name__})"


def header(known: Row, command: str) -> str:
    """Lines that say what was measured where."""
    packages = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    device = known.get("device", "device unknown")
    if "driver" in known:
        device += f", driver {known['driver']}, CUDA {known['cuda']}"
    return (
        f"`{command}`\n\n{datetime.date.today()}; {device}; {known.get('cpus', '?')} CPUs; "
        f"Python {known.get('python', '?')}; {packages}."
    )


def write(folder: Path, name: str, rows: Sequence[Row], top: str, notes: Sequence[str]) -> None:
    """Write ``cuda_NAME.csv`` and ``.md``; a column is there if any row has it."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"cuda_{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
    lines = [
        f"# CUDA suite: {name.replace('_', ', ')}",
        "",
        top,
        "",
        *[line for note in notes for line in (note, "")],
        table(rows, [column for column in columns if column not in ONLY_IN_CSV]),
        "",
    ]
    (folder / f"cuda_{name}.md").write_text("\n".join(lines), encoding="utf-8")


def table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows as a markdown table."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    columns = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (text(column, row.get(column)).replace("|", "/") for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(column: str, value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        ends = [end for end in DIGITS if column.endswith(end)]
        return f"{value:,.{DIGITS[max(ends, key=len)]}f}" if ends else f"{value:.4g}"
    return str(value)


def _plain(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value
