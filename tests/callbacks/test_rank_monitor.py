"""A process of two that dies takes the run with it, and the other one says why."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lit_lora.callbacks import RankMonitor

HERE = Path(__file__).parent
NOTICED = "Connection (reset|closed) by peer"
"""A killed process is noticed by gloo, by Lightning's launcher (a child's end) and by the monitor: who is first, ends
the run, and says why."""


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("how", "rank", "expected"),
    [
        ("raise", 1, "rank 0 stops: rank 1 failed: ValueError: the data of this rank is spoilt"),
        ("raise", 0, "rank 1 stops: rank 0 failed: ValueError: the data of this rank is spoilt"),
        ("kill", 1, f"{NOTICED}|rank: 1. Child process .* terminated with code -9|rank 0 stops: rank 1 has given no"),
        ("kill", 0, f"{NOTICED}|rank 1 stops: rank 0 is gone"),
        ("freeze", 1, "rank 0 stops: rank 1 has given no sign of life for 6 s"),
        ("nothing", 0, None),
    ],
)
def test_every_rank_ends_with_the_reason(how, rank, expected):
    """Within the time limit: the output is read until the last process has closed it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    command = [sys.executable, str(HERE / "rank_project.py"), how, str(rank)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if expected is None:
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("finished in order") == 2
        assert "stops:" not in done.stderr
    else:
        assert done.returncode != 0
        assert re.search(expected, done.stderr), done.stderr[-3000:]


def test_one_process_is_left_alone(make_trainer):
    from plain_projects import PlainModel

    monitor = RankMonitor()
    make_trainer(monitor).fit(PlainModel())
    assert monitor._thread is None


def test_settings_are_checked():
    with pytest.raises(ValueError, match="interval_s < timeout_s"):
        RankMonitor(timeout_s=1, interval_s=2)
