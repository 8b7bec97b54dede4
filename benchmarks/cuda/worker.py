"""One measurement, one process: started ahead, it imports what takes long, says so, and waits for its measurement.

A measurement that fails, runs out of memory or hangs ends its own process and nothing else. Imports take longer than
most measurements, so a few workers get ready together; while one measures, the others wait and touch no device.

    python -m benchmarks.cuda.worker        # prints "ready", reads the name of a job file, writes the result beside it
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_lora.files.environment import ALLOCATION_VARIABLES

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
GOOD = ("measured", "passed")
LOG_LENGTH = 6000
"""Of what a process printed, so many characters are kept, the last ones."""
MEASURES: dict[str, str] = {
    "facts": "benchmarks.cuda.report",
    "gpu_tests": "benchmarks.cuda.correctness",
    "gradients": "benchmarks.cuda.correctness",
    "nf4_decode": "benchmarks.cuda.correctness",
    "packed_equals_unpacked": "benchmarks.cuda.correctness",
    "peaks": "benchmarks.cuda.memory",
    "estimates": "benchmarks.cuda.memory",
    "longest_estimate": "benchmarks.cuda.memory",
    "longest_context": "benchmarks.cuda.memory",
    "initial_adapter": "benchmarks.cuda.speed",
    "products": "benchmarks.cuda.speed",
    "profiler": "benchmarks.cuda.speed",
    "framework": "benchmarks.cuda.speed",
}
"""Function that measures -> where it is; it takes the job's settings and gives what it measured."""


@dataclass
class Measurement:
    """What to measure, and how long that may take."""

    part: str
    name: str
    measure: str
    """A key of ``MEASURES``."""
    settings: Row
    limit_s: float = 120.0
    labels: Row = field(default_factory=dict)
    """Columns that say what it is a measurement of."""
    reason: str = ""
    """Why it is not run at all."""
    requires: tuple[str, ...] = ()
    """Keys of those that must have been measured, or passed, before."""

    def __post_init__(self) -> None:
        self.key = " ".join(str(value) for value in (self.name, *self.labels.values()))

    @property
    def row(self) -> Row:
        """The columns known before it ran."""
        return {"name": self.name, **self.labels}


@dataclass
class Outcome:
    """What became of a measurement."""

    status: str
    """"measured", or why there is nothing."""
    values: Row = field(default_factory=dict)
    seconds: float = 0.0
    log: str = ""
    """What the process printed, if it did not measure or a check failed."""


class Worker:
    """A process that waits for one measurement."""

    def __init__(self, folder: Path, number: int, *, hide_cuda: bool = False, also_import: Sequence[str] = ()) -> None:
        self._job = folder / f"job_{number}.json"
        self._log = folder / f"job_{number}.log"
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *_python_path()])}
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several, transformers' Trainer would take them all
        if hide_cuda:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.cuda.worker", *also_import], cwd=ROOT,
                env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def wait_ready(self, limit_s: float) -> None:
        """Until it has imported; one that dies or hangs before is found out by :meth:`run`."""
        assert self._process.stdout is not None
        if select.select([self._process.stdout], [], [], limit_s)[0]:
            self._process.stdout.readline()

    def run(self, measurement: Measurement, limit_s: float) -> Outcome:
        """Measure, for at most so long."""
        self._job.write_text(json.dumps({"measure": measurement.measure, "settings": measurement.settings}))
        start_s = time.monotonic()
        try:
            self._process.communicate(f"{self._job}\n", timeout=limit_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGUSR1)  # it says where it is
            time.sleep(0.5)
            self.stop()
            return Outcome(f"stopped after {limit_s:.0f} s", {}, time.monotonic() - start_s, self._end_of_log())
        except BrokenPipeError:
            self._process.wait()
        seconds = time.monotonic() - start_s
        self.stop()
        result = self._job.with_suffix(".result.json")
        if not result.is_file():
            lines = self._end_of_log().strip().splitlines() or ["no message"]
            last_words = next((line for line in lines if line.startswith("Fatal Python error")), lines[-1])[:300]
            status = f"error: the process ended with code {self._process.returncode}: {last_words}"
            return Outcome(status, {}, seconds, self._end_of_log())
        found = json.loads(result.read_text())
        log = "" if found["status"] in GOOD else self._end_of_log()
        return Outcome(found["status"], found["values"], seconds, log)

    def stop(self) -> None:
        """End the process and what it started."""
        # A group that is gone has ended, and all that it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _end_of_log(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_LENGTH:]


def perform(name: str, settings: Row) -> Outcome:
    """Measure in this process; every failure is an outcome."""
    import torch

    start_s = time.monotonic()
    values: Row = {}
    try:
        measure: Callable[[Row], Row] = getattr(importlib.import_module(MEASURES[name]), name)
        values = measure(settings)
        status = values.pop("status", "measured")
    except torch.OutOfMemoryError:
        traceback.print_exc()
        status = "out of memory"
    except Exception as error:
        traceback.print_exc()
        status = f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Outcome(status, values, time.monotonic() - start_s)


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def main() -> None:
    os.environ.update(ALLOCATION_VARIABLES)  # what the command line does
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    for name in ("torch", "lightning", "transformers", "lit_lora", *sys.argv[1:]):  # the first start no CUDA
        importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    print("ready", flush=True)
    path = Path(sys.stdin.readline().strip())
    if not path.name:
        return
    job = json.loads(path.read_text())
    outcome = perform(job["measure"], job["settings"])
    path.with_suffix(".result.json").write_text(json.dumps({"status": outcome.status, "values": outcome.values}))


if __name__ == "__main__":
    main()
