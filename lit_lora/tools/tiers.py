"""``lit-lora tiers``: five QLoRA runs, 10 steps to 7B, and a table of what they proved; skips what cannot run here.

Each runs in a process of its own, so that one's memory is not another's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from lit_lora.metrics import FILE_NAME, TrainingMetrics


class Tier(NamedTuple):
    """One run."""

    config: str
    """File name under ``configs/tiers``."""
    cpu_minutes: float | None
    """How long it takes on two cores without a GPU, roughly; None where that is no use."""
    gpu_gib: float
    """GPU memory that it needs."""
    fetched: str | None = None
    """Model that has to be fetched before."""


TIERS = {
    1: Tier("1_quick", 2, 1, "smollm2-135m-instruct"),
    2: Tier("2_convergence", 5, 1, "smollm2-135m-instruct"),
    3: Tier("3_memory", 15, 2),
    4: Tier("4_extended", 120, 4),
    5: Tier("5_full", None, 12),
}


def tiers(only: list[int] | None = None, max_minutes: float = 20, output: str = "runs/tiers") -> None:
    """Run the tiers, skip those that this machine cannot run, and print a table.

    Args:
        only: numbers of the tiers to run, of 1 to 5; all by default.
        max_minutes: skip tiers that are expected to take longer.
        output: folder for the runs of this time, each in a folder of its own.
    """
    unknown = sorted(set(only or []) - TIERS.keys())
    if unknown:
        raise ValueError(f"no tiers {unknown}: expected numbers from 1 to {len(TIERS)}")
    folder = Path(output) / datetime.now().strftime("%Y%m%d-%H%M%S")
    rows, failed = [], []
    for number in sorted(set(only or TIERS)):
        name = TIERS[number].config
        if reason := why_not(TIERS[number], max_minutes):
            rows.append((name, "skipped", reason))
            continue
        print(f"=== tier {name}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, "-m", "lit_lora", "fit", "--config", f"tiers/{name}.yaml"]
        finished = subprocess.run([*command, "--trainer.default_root_dir", str(folder / name)], check=False)
        minutes = (time.perf_counter() - started) / 60
        passed = finished.returncode == 0
        failed += [] if passed else [name]
        weights = "random weights; " if TIERS[number].fetched is None else ""
        detail = f"{minutes:.1f} min; {weights}{_results(folder / name)}"
        rows.append((name, "passed" if passed else "FAILED", detail))
    print("\n" + "\n".join(f"{name:<16}{result:<9}{detail}" for name, result, detail in rows))
    if failed:
        raise RuntimeError(f"tiers failed: {', '.join(failed)}; see {folder}")


def why_not(tier: Tier, max_minutes: float) -> str:
    """Why this machine cannot run a tier; empty if it can."""
    import torch

    from lit_lora.base.known_models import is_complete, model_folder

    if tier.fetched is not None and not is_complete(model_folder(tier.fetched)):
        return f"run `lit-lora fetch {tier.fetched}` first"
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        return "" if gib >= tier.gpu_gib else f"needs {tier.gpu_gib:g} GiB of GPU memory, there are {gib:.0f}"
    if tier.cpu_minutes is None:
        return "needs a CUDA device"
    if tier.cpu_minutes > max_minutes:
        return f"takes about {tier.cpu_minutes:g} minutes without CUDA: --max_minutes {tier.cpu_minutes:g}"
    return ""


def _results(folder: Path) -> str:
    """Loss and verdicts of a run, as far as it wrote them."""
    parts: Sequence[str] = []
    record = folder / FILE_NAME
    if record.is_file() and (steps := TrainingMetrics.load(record).steps):
        parts = [f"loss {steps[0].loss:.2f} -> {steps[-1].loss:.2f} in {len(steps)} steps"]
    verdicts = folder / "verdict.json"
    if verdicts.is_file():
        content = json.loads(verdicts.read_text(encoding="utf-8"))["verdicts"]
        told = [verdict for verdict in content if verdict["passed"] is False or verdict["name"] == "memory"]
        parts = [*parts, *(f"{verdict['name']}: {verdict['detail']}" for verdict in told)]
    return "; ".join(parts) or "stopped before it wrote anything"
