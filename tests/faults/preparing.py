"""Kills of a run on several sources, while it tokenizes them in several processes, mixes them, trains, or resumes."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from tests.faults.runs import Budget, Process, Project, Tally, same
from tests.faults.states import kill

_ROWS = {"own": 60, "general": 300}


def small_blocks() -> None:
    """In the run's process: what counts as large is a few rows, so that there is something to be killed in."""
    from lit_lora.data.prepared import tokenizing
    from lit_lora.data.rows import readers

    readers.BLOCK_ROWS, tokenizing.LARGE_BYTES = 10, 1


def sources(folder: Path) -> list[dict[str, Any]]:
    """Two, one of them replayed."""
    for name, count in _ROWS.items():
        rows = [{"prompt": f"{name} {i}", "completion": f"say {i} " * (1 + i % 3)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        {"path": str(folder / "own.jsonl"), "epochs": 1.5},
        {"path": str(folder / "general.jsonl"), "weight": 0.2, "name": "replay"},
    ]


def killed_preparing(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """A run that is killed again and again from its first moment on ends as the undisturbed one.

    Every other kill waits until there are finished blocks, and the one after until they are put together.
    """
    tally = Tally("kill -9 while data is tokenized or mixed")
    data = {"train": sources(project.folder), "tokenize_workers": 2}

    def fit(name: str) -> Process:
        own = data | {"cache_dir": str(project.folder / f"{name}-cache")}
        return project.fit(name, name, "--ckpt_path", "last", prepare=small_blocks, data=own)

    if not budget.allows(tally.name, count):
        return tally
    whole = fit("mixed")
    assert whole.wait() == 0, whole.text
    run_s, expected = time.monotonic() - whole.started_s, project.end("mixed")
    done = number = 0
    while done < count:
        if not budget.allows(tally.name, count - done):
            break
        name = f"preparing{number}"
        number += 1
        cache = project.folder / f"{name}-cache"
        for attempt in range(rng.randint(2, 6)):
            process = fit(name)
            marks = ("*.parts/*", ".*.partial") if attempt % 2 else ()
            wait_s = rng.uniform(0, run_s)
            while process.poll() is None and time.monotonic() - process.started_s < wait_s:
                if any(any(cache.glob(mark)) for mark in marks[rng.randrange(2) :]):
                    break
                time.sleep(0.005)
            workers = _workers(process)
            kill(process)
            _, alive = psutil.wait_procs(workers, timeout=30)
            done += 1
            broken = project.broken_files(name)
            fine = not alive and not broken and "Traceback" not in process.text
            tally.check(fine, f"{name}: {len(alive)} workers left, {broken}, see {process.log}")
        last = fit(name)
        fine = last.wait() == 0 and not project.leftovers(name) and same(expected, project.end(name))
        fine = fine and not [*cache.glob("*.parts")]
        tally.check(fine, f"{name}: exit {last.code} at the end, see {last.log}")
        if fine:
            shutil.rmtree(project.folder / name)
            shutil.rmtree(cache)
    return tally


def _workers(process: Process) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
