"""A process of two that dies takes the run with it, and the other one says why."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_lora.callbacks import RankMonitor

HERE = Path(__file__).parent
NOTICED = "Connection (reset|closed) by peer"
"""A killed process is noticed by gloo, by Lightning's launcher (a child's end) and by the monitor: who is first, ends
the run, and says why."""


def environment():
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("how", "rank", "expected"),
    [
        ("raise", 1, "rank 0 stops: rank 1 failed: ValueError: the data of this rank is spoilt"),
        ("raise", 0, "rank 1 stops: rank 0 failed: ValueError: the data of this rank is spoilt"),
        ("kill", 1, f"{NOTICED}|rank: 1. Child process .* terminated with code -9|rank 0 stops: rank 1 has given no"),
        ("kill", 0, f"{NOTICED}|rank 1 stops: rank 0 is gone"),
        ("freeze", 1, "rank 0 stops: rank 1 has given no sign of life for 6 s"),
    ],
)
def test_every_rank_ends_with_the_reason(how, rank, expected):
    """Within the time limit: the output is read until the last process has closed it."""
    command = [sys.executable, str(HERE / "rank_project.py"), how, str(rank)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert re.search(expected, done.stderr), done.stderr[-3000:]


@pytest.mark.ddp
def test_a_run_that_is_paused_as_a_whole_goes_on():
    """For longer than the timeout of 3 s; its processes wake one after the other."""
    command = [sys.executable, str(HERE / "rank_project.py"), "pause", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        try:
            pids: set[int] = set()
            while len(pids) < 2:
                line = process.stdout.readline()
                assert line, process.communicate()
                pids |= {int(line.split()[1])} if line.startswith("pid") else set()
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            time.sleep(4.5)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
                time.sleep(1)
            output, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, error[-3000:]
    assert output.count("finished in order") == 2
    assert "stops:" not in error


def test_one_process_is_left_alone(make_trainer):
    from plain_projects import PlainModel

    monitor = RankMonitor()
    make_trainer(monitor).fit(PlainModel())
    assert monitor._thread is None


def test_settings_are_checked():
    with pytest.raises(ValueError, match="interval_s < timeout_s"):
        RankMonitor(timeout_s=1, interval_s=2)
