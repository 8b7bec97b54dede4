"""Two processes: decisions are alike on both, whichever of them has the trouble."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.ddp
def test_both_processes_decide_alike(tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "ddp_project.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert [verdict[:2] for verdict in first["verdicts"]] == [verdict[:2] for verdict in second["verdicts"]]
    assert all(passed for _, passed, *_ in first["verdicts"][1:])
    assert first["verdicts"][0] == second["verdicts"][0]  # the same means over both
    assert re.findall(r"^step (\d)/6, loss", done.stdout, re.MULTILINE) == ["1", "6"]  # of one process
    assert first["best"] == second["best"] == [1.0, 6]  # as the first process sees it
    assert first["skipped"] == second["skipped"] == 1
    assert first["tokens"] == second["tokens"] == 4 * 2 * 128
    assert first["weights"] == second["weights"]
    assert "step 3" in first["stopped"]
    assert "step 3" in second["stopped"]
    record = json.loads((tmp_path / "non_finite_step_3.json").read_text())
    assert len(record["example_ids_by_rank_and_micro_batch"]) == 2
    assert first["exceeded"] == "another process exceeded the memory budget"
    assert "budget 1 MiB" in second["exceeded"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
