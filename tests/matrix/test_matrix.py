"""Settings of Lightning's own, every pair of them together in some run: it works, or is refused before the model is
loaded by a line that names the setting."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.metrics import TrainingMetrics
from tests.command_line import lit_lora
from tests.faults.runs import same
from tests.matrix.pairwise import pairs_of, pairwise
from tests.matrix.runner import Project, case_names
from tests.matrix.settings import (
    ALONE,
    COLUMNS,
    KILLED_ALONE,
    NOT_TRIED,
    REFUSED,
    REFUSED_PAIRS,
    ROWS,
    allowed,
    options_of,
)
from tests.matrix.table import tables, written

ROOT = Path(__file__).parents[2]
WORKING = [f"row {number}" for number in range(len(ROWS))]
WHY = dict(
    zip(case_names()[len(ROWS) + len(ALONE) :], [*(case.why for case in REFUSED), *REFUSED_PAIRS.values()], strict=True)
)


class Ended(NamedTuple):
    """The processes of a case."""

    codes: list[int]
    folder: Path

    def log(self, name: str = "whole") -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


@pytest.fixture(scope="module")
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """All cases that were asked for are run by the first one."""
    items = [item for item in request.session.items if item.path == request.path]
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    names = list(dict.fromkeys(given["case"] for given in parameters if "case" in given))
    folder = tmp_path_factory.mktemp("matrix")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.matrix.runner", str(folder), json.dumps(names)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    return lambda case: Ended(codes[case], folder / case.replace("/", "-"))


def state_at_the_end(run: Path) -> dict[str, Any]:
    """What has to be the same after a kill."""
    content = read_checkpoint(max((run / "checkpoints").glob("step=*.ckpt")))
    kept = {key: content[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    steps = [replace(step, step_time_s=0) for step in TrainingMetrics.load(run / "metrics.jsonl").steps]
    return {**kept, "point": content["lit_lora"]["training_point"], "steps": steps, "adapter": adapter(run)}


def adapter(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("case", WORKING)
def test_a_row_works(ended, case):
    row, run = ROWS[WORKING.index(case)], ended(case)
    resumed = row["run"] == "killed and resumed"
    assert run.codes == ([0, -9, 0] if resumed else [0]), f"{row}\n{run.log()[-3000:]}"
    folder = run.folder / "whole"
    assert re.search(r"^lit_lora: proved$", run.log(), re.MULTILINE), run.log()[-2000:]
    assert "frozen tensors bit-identical" in run.log()
    steps = TrainingMetrics.load(folder / "metrics.jsonl").steps
    assert all(math.isfinite(step.loss) and step.loss > 0 for step in steps)
    expected = math.ceil(8 / int(row["accumulation"])) * 2 if row["end"] == "max_epochs" else 6
    assert row["end"] == "max_time" or len(steps) == expected
    assert row["schedule"] not in ("cosine", "linear") or steps[-1].learning_rate < 0.5 * steps[1].learning_rate
    assert list(folder.glob("checkpoints/step=*.ckpt")) or row["checkpoints"] == "off"
    hparams = len(list(folder.rglob("hparams.yaml")))
    assert hparams == {"ours": 1, "none": 0, "two of Lightning's": 2}[row["logger"]]
    exported = adapter(folder)
    assert exported
    if row["checkpoints"] == "on":
        saved = state_at_the_end(folder)["state_dict"]
        plain = {f"model.{name.removeprefix('base_model.model.')}": value for name, value in exported.items()}
        assert same(dict(sorted(plain.items())), dict(sorted(saved.items())))
    if resumed:
        assert same(state_at_the_end(run.folder / "resumed"), state_at_the_end(folder)), row


@pytest.mark.parametrize("case", ALONE)
def test_a_setting_works(ended, case):
    run = ended(case)
    assert run.codes == ([0, -9, 0] if case in KILLED_ALONE else [0]), run.log()[-3000:]
    headline = "NOT JUDGED: adapter export" if case.startswith("fast_dev_run") else "proved"  # it writes nothing
    assert re.search(rf"^lit_lora: {headline}$", run.log(), re.MULTILINE), run.log()[-2000:]
    if case in KILLED_ALONE:
        assert same(state_at_the_end(run.folder / "resumed"), state_at_the_end(run.folder / "whole"))


@pytest.mark.parametrize("case", WHY)
def test_it_is_refused_before_the_model_is_loaded(ended, case):
    run = ended(case)
    assert run.codes in ([1], [2]), run.log()[-2000:]
    error = run.log().partition("lit-lora: error: ")[2]
    assert WHY[case] in error
    assert "Forward path" not in run.log()
    assert "Traceback" not in run.log()
    assert not list(run.folder.rglob("*.ckpt"))


@pytest.mark.ddp
@pytest.mark.parametrize(
    "row",
    [
        {"optimizer": "AdamWScheduleFree", "schedule": "constant", "precision": "bf16-mixed", "clipping": "norm",
         "callbacks": "EarlyStopping", "accumulation": "3", "logger": "two of Lightning's"},
        {"optimizer": "SGD", "schedule": "ReduceLROnPlateau", "callbacks": "ModelCheckpoint", "base": "4 bits",
         "dropout": "0.1", "clipping": "value", "batches": "padded"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("strategy", ["ddp", "lora_sharded"])
def test_two_processes_work(tmp_path, row, strategy):
    options = {**options_of(row), "trainer.strategy": strategy, "trainer.devices": 2}
    path = Project(tmp_path).write_config(tmp_path / "run", options)
    done = lit_lora("fit", "--config", path)
    assert re.search(r"^lit_lora: proved$", done.stdout, re.MULTILINE)
    assert "frozen tensors bit-identical" in done.stdout
    assert adapter(tmp_path / "run")


def test_every_pair_of_values_is_tried_or_says_why_not():
    covered = set().union(*map(pairs_of, ROWS))
    left_out = {frozenset(pair) for pair in (*REFUSED_PAIRS, *NOT_TRIED)}
    for (one, its), (other, others) in combinations(COLUMNS.items(), 2):
        for pair in ({(one, a), (other, b)} for a in its for b in others):
            assert (frozenset(pair) in covered) != (frozenset(pair) in left_out), pair
    assert all(allowed(row) for row in ROWS)
    assert len(ROWS) >= 40


def test_pairwise_is_the_same_each_time_and_misses_nothing():
    columns = {name: [f"{name}{number}" for number in range(3)] for name in "abcde"}
    rows = pairwise(columns, lambda row: not {("a", "a1"), ("b", "b1")} <= row.items())
    assert rows == pairwise(columns, lambda row: not {("a", "a1"), ("b", "b1")} <= row.items())
    assert len(set().union(*map(pairs_of, rows))) == 10 * 9 - 1
    assert len(rows) < 20


def test_the_page_of_the_documentation_repeats_the_tables():
    assert written() == tables(), "run python -m tests.matrix.table"
