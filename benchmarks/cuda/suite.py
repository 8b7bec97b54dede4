"""For a machine with a GPU: correctness, memory and speed, within a budget of time and without a network.

    benchmarks/cuda/calls.sh small|checks|7b FOLDER                          # everything, in three calls of 520 s
    python -m benchmarks.cuda.suite --parts speed --models smollm2-135m --rounds 5 --name smollm2
    python -m benchmarks.cuda.suite --device cpu --models tiny --output out  # tries the suite out, measures nothing

Run on an H200 and an H100, but for the longest contexts. On a CPU what needs CUDA says so; the rest runs.

Models have random weights, data is random tokens of natural lengths (``data.py``). Each measurement is a process
of its own with a time limit (``worker.py``), so one that fails, hangs or runs out of memory is a row that says so,
and the next one runs; the end of what it printed goes to ``cuda_log.txt``, one that was stopped says where it was.
What the budget has no time for is a row too: "not run: out of time".

- *correctness* (``correctness.py``): tests marked ``gpu``; gradients in float32 and bfloat16 against float64 on
  the CPU; NF4 decoded bit for bit; packed equals unpacked; the memory estimate against the allocator.
- *memory* (``memory.py``): measured peaks of LoRA and QLoRA next to estimate and bound; the longest context that a
  7B QLoRA reaches in 8, 12, 16 and 24 GB. Estimates are traced beside the correctness checks, with the GPU hidden.
- *speed* (``speed.py``): against PEFT with transformers' Trainer, once gradients equal PEFT's. One round of
  everything comes before the second, so that a short budget costs rounds and not rows. ``--anyway`` measures though
  gradients differ.

Results go to ``benchmarks/results/cuda_{correctness,memory,speed}.csv`` and ``.md`` after every measurement. Exits with
1 if a check failed, a bound was not held or a measurement ended in an error.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.cuda import plan as cuda_plan
from benchmarks.cuda import report as cuda_report
from benchmarks.cuda.data import TINY
from benchmarks.cuda.speed import FRAMEWORKS
from benchmarks.cuda.worker import Measurement, Outcome, Row, Worker
from lit_lora.base.architectures import ARCHITECTURES

PARTS = ("correctness", "memory", "speed")
RESULTS = Path(__file__).parents[1] / "results"
OUT_OF_TIME = "not run: out of time"
SHORTEST_S = 5.0
"""With less time than this left, nothing is started."""

Tell = Callable[[str, list[Row]], None]
Estimates = dict[str, Callable[[], Outcome]]


class Suite:
    """Runs measurements one after another until the time is up."""

    def __init__(
        self,
        folder: Path,
        budget_s: float,
        *,
        num_ready: int,
        start: Callable[..., Worker] = Worker,
        also_import: Sequence[str] = (),
    ) -> None:
        """Nothing runs yet.

        Args:
            folder: for jobs, models and data.
            budget_s: from now on.
            num_ready: workers that get ready together.
            start: makes a worker.
            also_import: what workers import beside the usual while they get ready; it may start CUDA.
        """
        self._folder = folder
        self._deadline_s = time.monotonic() + budget_s
        self._num_ready = num_ready
        self._start = start
        self._also_import: dict[str, Any] = {"also_import": also_import} if also_import else {}
        self._ready: list[Worker] = []
        self._num_started = 0
        self._background = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4))

    @property
    def left_s(self) -> float:
        """Time left."""
        return self._deadline_s - time.monotonic()

    def run(self, measurement: Measurement, *, num_to_come: int = 1) -> Outcome:
        """One measurement, or why there is none.

        Args:
            measurement: what to measure.
            num_to_come: so many will follow, this one included.
        """
        if not self._ready and self.left_s > SHORTEST_S:
            self._ready = [self._worker(**self._also_import) for _ in range(max(1, min(self._num_ready, num_to_come)))]
            for worker in self._ready:
                worker.wait_ready(max(self.left_s, 0.0))
        if self.left_s < SHORTEST_S:
            return Outcome(OUT_OF_TIME)
        return self._limited(self._ready.pop(0), measurement)

    def behind(self, measurement: Measurement) -> Callable[[], Outcome]:
        """Measure beside the others, with the GPU hidden; gives what waits for the outcome."""

        def work() -> Outcome:
            if self.left_s < SHORTEST_S:
                return Outcome(OUT_OF_TIME)
            worker = self._worker(hide_cuda=True)
            worker.wait_ready(max(self.left_s, 0.0))
            return self._limited(worker, measurement)

        return self._background.submit(work).result

    def close(self) -> None:
        """End the workers that were not needed."""
        self._background.shutdown(cancel_futures=True)
        for worker in self._ready:
            worker.stop()
        self._ready = []

    def _worker(self, **options: Any) -> Worker:
        self._num_started += 1
        return self._start(self._folder, self._num_started, **options)

    def _limited(self, worker: Worker, measurement: Measurement) -> Outcome:
        left_s = max(self.left_s, 0.1)
        outcome = worker.run(measurement, min(measurement.limit_s, left_s))
        if outcome.status.startswith("stopped") and left_s < measurement.limit_s:
            outcome.status = f"{outcome.status}: out of time"
        return outcome


def run_part(
    suite: Suite,
    part: str,
    plan: Sequence[Measurement],
    tell: Tell,
    estimates: Estimates,
    tell_log: Callable[[str, str], None] = lambda name, log: None,
) -> list[Row]:
    """Run a plan; every measurement of it gets a row.

    Args:
        suite: runs them.
        part: of the suite.
        plan: in order.
        tell: gets the part and its rows so far, after each.
        estimates: by the key of the measurement that each belongs to; waited for when it is its turn.
        tell_log: gets the key and the output of each that failed.
    """
    rows: list[Row] = []
    outcomes: dict[str, str] = {}
    for index, measurement in enumerate(plan):
        reason = cuda_plan.why_not(measurement, outcomes)
        if reason:
            outcome = Outcome(reason)
        else:
            cuda_plan.adjust(measurement, outcomes)
            if measurement.key in estimates:
                cuda_plan.complete(measurement, estimates[measurement.key]())
            outcome = suite.run(measurement, num_to_come=len(plan) - index)
        outcomes[measurement.key] = outcome.status
        seconds = round(outcome.seconds, 1) if outcome.seconds else None
        rows.append({**measurement.row, "status": outcome.status, **outcome.values, "took_s": seconds})
        print(f"[{suite.left_s:4.0f} s left] {part}: {measurement.key}: {outcome.status[:120]}", flush=True)
        if outcome.log:
            tell_log(measurement.key, outcome.log)
        tell(part, rows)
    return rows


def main(arguments: Sequence[str] | None = None, start: Callable[..., Worker] = Worker) -> int:
    """Run the suite.

    Args:
        arguments: of the command line.
        start: makes a worker.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(given)
    unknown = [model for model in args.models if model not in (TINY, *ARCHITECTURES)]
    if unknown:
        raise SystemExit(f"--models {unknown}: known are {', '.join((TINY, *ARCHITECTURES))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, and torch finds no CUDA device: --device cpu tries the suite out")
    output = Path(args.output) if args.output else RESULTS
    if args.device == "cpu" and not args.output:
        raise SystemExit("--device cpu measures no GPU: set --output to a folder that is not the results of one")
    command = shlex.join(["python", "-m", "benchmarks.cuda.suite", *given])
    gone_s = time.time() - psutil.Process().create_time() if arguments is None else 0.0
    trainers = ("transformers.trainer",) if args.parts == ["speed"] else ()
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), args.budget_s - gone_s, num_ready=args.ready, start=start, also_import=trainers)
        try:
            rows = _measure(suite, args, Path(folder), output, command)
        finally:
            suite.close()
    print("\n" + cuda_report.table(_summary(rows), ["name", "model", "status", "result"]))
    for part, found in rows.items():
        print("".join(f"\n{note}" for note in cuda_plan.verdicts(part, found)))
    return int(any(cuda_plan.is_bad(row) for part in rows.values() for row in part))


def _measure(suite: Suite, args: argparse.Namespace, folder: Path, output: Path, command: str) -> dict[str, list[Row]]:
    facts = suite.run(Measurement("", "facts", "facts", {"device": args.device}), num_to_come=args.ready)
    if facts.status != "measured":
        print(f"device and versions: {facts.status}\n{facts.log}")
    top = cuda_report.header(facts.values or {"versions": cuda_report.versions()}, command)
    finished: dict[str, list[Row]] = {}
    plans = {part: cuda_plan.PLANS[part](args, folder) for part in PARTS if part in args.parts}
    estimates: Estimates = {}
    if "memory" in plans:
        behind = cuda_plan.estimates(plans["memory"], facts.values.get("context_bytes", 0))
        estimates = {key: suite.behind(measurement) for key, measurement in behind.items()}

    for part, plan in plans.items():

        def tell(part: str, rows: list[Row]) -> None:
            finished[part] = cuda_plan.finished(part, rows)
            name = "_".join(filter(None, (part, args.name)))
            cuda_report.write(output, name, finished[part], top, cuda_plan.notes(part, finished[part], args))

        def tell_log(key: str, log: str, part: str = part) -> None:
            output.mkdir(parents=True, exist_ok=True)
            with (output / f"cuda_{'_'.join(filter(None, ('log', args.name)))}.txt").open(
                "a", encoding="utf-8"
            ) as file:
                file.write(f"===== {part}: {key}\n{log}\n")

        run_part(suite, part, plan, tell, estimates if part == "memory" else {}, tell_log)
    return finished


def _summary(rows: dict[str, list[Row]]) -> list[Row]:
    return [
        {**row, "status": row["status"][:100], "result": cuda_plan.result(row)}
        for found in rows.values()
        for row in found
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", default=list(ARCHITECTURES), help=f"or {TINY}, to try the suite out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds for everything, the start included")
    parser.add_argument("--output", help="folder for the results; benchmarks/results by default, on CUDA")
    parser.add_argument(
        "--name", default="", help="goes into the file names, so that calls for parts stand side by side"
    )
    parser.add_argument("--ready", type=int, default=max(1, min((os.cpu_count() or 1) // 2, 8)),
                        help="processes that get ready together")  # fmt: skip
    parser.add_argument("--context-gb", type=float, nargs="+", default=list(cuda_plan.CONTEXT_LIMITS_GB),
                        help="memory to find the longest context for")  # fmt: skip
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS, help="of the speed part")
    parser.add_argument(
        "--anyway", action="store_true", help="measure speed though parity with PEFT fails; exits with 1"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of the speed part")
    parser.add_argument("--steps", type=int, default=16, help="counted steps of a speed measurement")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step, in the speed part")
    return parser


if __name__ == "__main__":
    sys.exit(main())
