"""Faults of runs in two processes whose base is divided among them: one of the two killed, and a run that changes its
number of processes and its strategy, each time after a kill.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import torch
import yaml

from lit_lora.files.checkpoint import newest_checkpoint
from tests.faults.runs import Budget, Project, Tally

END_S = 60.0
"""Within which every rank has ended once one was killed."""

SHARDED = {"devices": 2, "strategy": "lora_sharded", "accumulate_grad_batches": 1}
DDP = {**SHARDED, "strategy": "ddp"}
CHAIN = [{}, SHARDED, DDP, {}]
"""All with steps of two micro-batches."""


class TwoProcesses:
    """``lit-lora fit`` by a command of its own: it starts the other rank, with the same command."""

    def __init__(self, project: Project, name: str, log: str, trainer: dict[str, object]) -> None:
        (project.folder / name).mkdir(exist_ok=True)
        config = project.config(name)
        config["trainer"] |= trainer
        config["model"]["lora"]["lora_dropout"] = 0.0  # another number of processes draws others
        path = project.folder / f"{log}.yaml"
        path.write_text(yaml.safe_dump(config))
        self.log = project.folder / f"{log}.log"
        command = [sys.executable, "-m", "lit_lora", "fit", "--config", str(path), "--ckpt_path", "last"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def ranks(self) -> list[psutil.Process]:
        """The first process, and those that it has started to compute with."""
        try:
            first = psutil.Process(self.process.pid)
            return [first, *(each for each in first.children() if "lit_lora" in " ".join(each.cmdline()))]
        except psutil.NoSuchProcess:
            return []

    def wait(self, timeout_s: float, ranks: list[psutil.Process] | None = None) -> int | None:
        """Exit code of the first rank; None if a rank is there after that time, and is then killed.

        ``ranks`` are those from before a kill: a first rank that is dead has no children to be found by.
        """
        others, ends_s = (ranks or self.ranks())[1:], time.monotonic() + timeout_s
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        _, alive = psutil.wait_procs(others, max(0.0, ends_s - time.monotonic()))
        alive += [psutil.Process(self.process.pid)] if self.process.poll() is None else []
        for process in alive:
            process.kill()
        return None if alive else self.process.wait()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


def killed_ranks(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """Every rank ends in time and says why, and the newest checkpoint can be read and gone on from."""
    tally = Tally("a rank killed, base divided")
    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name = f"rank{number}"
        run = TwoProcesses(project, name, name, SHARDED)
        folder = project.folder / name / "run" / "checkpoints"
        while not list(folder.glob("*.ckpt")) and run.process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3 * project.run_s))  # a step, a save or a validation
        ranks = run.ranks()
        if len(ranks) == 2:
            ranks[number % 2].send_signal(signal.SIGKILL)
        code = run.wait(END_S, ranks)
        newest, problems = newest_checkpoint(*project.checkpoints(name))
        told = code == 0 or any(reason in run.text for reason in ("stops:", "peer", "terminated with code -9"))
        broken = project.broken_files(name)
        resumed = TwoProcesses(project, name, f"{name}-resumed", SHARDED).wait(120)
        fine = code is not None and newest is not None and not problems and told and not broken and resumed == 0
        seen = f"{problems}, {'' if told else 'no '}reason told, left {broken}, resumed: exit {resumed}"
        tally.check(fine, f"{name}: exit {code} of {len(ranks)} ranks, newest {newest}, {seen}, see {run.log}")
    return tally


def changing_strategy(project: Project, rng: random.Random, budget: Budget, count: int) -> Tally:
    """One process, two with a divided base, two with whole ones, one: killed in between, and it ends as one alone."""
    tally = Tally("other processes after a kill")
    if not budget.allows(tally.name, count):
        return tally
    alone = TwoProcesses(project, "alone", "alone", {})
    assert alone.wait(120) == 0, alone.text
    expected = project.end("alone")
    for number in range(count):
        if not budget.allows(tally.name):
            continue
        name, codes = f"chain{number}", []
        for part, trainer in enumerate(CHAIN):
            run, ranks = TwoProcesses(project, name, f"{name}-{part}", trainer), None
            until = 5 * part + rng.uniform(1, 5)
            while part < len(CHAIN) - 1 and run.process.poll() is None:
                if _steps(project, name) > until:
                    ranks = run.ranks()
                    for process in ranks[::-1]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.kill()
                    break
                time.sleep(0.02)
            codes.append(run.wait(120, ranks))
        end = project.end(name) if codes[-1] == 0 else {}
        fine = bool(end) and all(
            torch.allclose(end["state_dict"][key], value, rtol=1e-3, atol=1e-5)
            for key, value in expected["state_dict"].items()
        )
        tally.check(fine, f"{name}: exits {codes}, see {run.log}")
    return tally


def _steps(project: Project, name: str) -> int:
    steps = [int(path.stem.split("=")[1]) for path in (project.folder / name).rglob("step=*.ckpt")]
    return max(steps, default=0)


def ranks(project: Project, rng: random.Random, budget: Budget) -> list[Tally]:
    """All of this file."""
    return [killed_ranks(project, rng, budget, 6), changing_strategy(project, rng, budget, 2)]
