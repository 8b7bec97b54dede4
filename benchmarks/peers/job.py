"""What the runners of ``frameworks.py`` share: a job's fields, and what is told of a run.

With ``profile`` set one more step follows the counted ones, under torch's profiler: what it launched is told, and its
time is not counted.
"""

from __future__ import annotations

import itertools
import json
import resource
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.step_clock import StepClock

Job = dict[str, Any]
STARTED_S = psutil.Process().create_time()


def examples_of(job: Job) -> list[tuple[list[int], list[bool]]]:
    return [(ids, mask) for ids, mask in json.loads(Path(job["examples"]).read_text())]


def counted(job: Job) -> list[tuple[list[int], list[bool]]]:
    """Examples of the steps that are timed; the same for every framework."""
    size = job["batch_size"]
    return examples_of(job)[size * warm_up_of(job) : size * job["steps"]]


def num_steps(job: Job) -> int:
    """Steps to run: ``steps``, of which the first are not counted, and the profiled one."""
    return job["steps"] + bool(job.get("profile"))


def result_of(job: Job, clock: StepClock, losses: list[float]) -> dict[str, Any]:
    ends_s = clock.ends_s()
    timed = counted(job)
    result = {
        "num_tokens": sum(len(ids) for ids, _ in timed),
        "num_target_tokens": sum(sum(mask) for _, mask in timed),
        "step_times_s": [b - a for a, b in itertools.pairwise(ends_s[warm_up_of(job) - 1 :])],
        "time_to_first_step_s": ends_s[0] - STARTED_S,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_loss": sum(losses) / len(losses),
        **clock.profiled,
    }
    if device_of(job) == "cuda":
        import torch

        result["peak_allocated_mb"] = torch.cuda.max_memory_allocated() / 1e6
        result["peak_reserved_mb"] = clock.reserved_bytes / 1e6  # while it trains none is given back
    return result


def device_of(job: Job) -> str:
    return job.get("device", "cpu")


def warm_up_of(job: Job) -> int:
    return job.get("warm_up", 1)


def clock_of(job: Job) -> StepClock:
    on_cuda = device_of(job) == "cuda"
    return StepClock(on_cuda=on_cuda, warm_up=warm_up_of(job), last=job["steps"], profile=bool(job.get("profile")))
