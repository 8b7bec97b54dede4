"""``lit-lora sweep``: every combination once, the finished ones never again, and a comparison at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_lora.__main__ import main
from lit_lora.metrics import TrainingMetrics
from lit_lora.report.outcome import read_outcome
from tests.tiny import config

pytestmark = [
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning, about loggers, workers and short runs
]

FIT = (
    "--model.base=random:tiny.json", "--data.tokenizer=bytes",
    "--data.train=train.jsonl", "--data.validation=train.jsonl",
    "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--checkpoint.every_n_steps=1", "--checkpoint.keep_last=2", "--convergence.min_decrease=0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    config("Llama", vocab_size=260).to_json_file("tiny.json")
    rows = [{"prompt": f"say {n}", "completion": f"it is {n % 3}"} for n in range(8)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sweep(*arguments: str) -> None:
    main(["sweep", *arguments])


def test_every_combination_runs_once_and_a_stopped_one_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    # One combination fails while it runs: its data cannot be read.
    asked = ("convergence.min_decrease=0.0,0.999", "model.lora.r=[4]", *FIT[:-1])
    sweep(*asked)
    said = capfd.readouterr().out
    folders = sorted(path for path in Path("runs/sweep").iterdir() if path.is_dir())
    assert [path.name for path in folders] == ["01,min_decrease=0.0,r=4", "02,min_decrease=0.999,r=4"]
    results = [read_outcome(path).result for path in folders]  # type: ignore[union-attr]
    assert results == ["proved", "not proved"]
    table = said[said.index("validation loss") :].splitlines()[1:3]
    losses = [float(line.split()[1]) for line in table]
    assert losses == sorted(losses)
    ends = {path.name[3:]: TrainingMetrics.load(path / "metrics.jsonl").validation[-1]["val_loss"] for path in folders}
    assert {line.split()[0]: float(line.split()[1]) for line in table} == {
        name: pytest.approx(loss, abs=1e-4) for name, loss in ends.items()
    }
    page = Path("runs/sweep/report.html").read_text()
    assert all(path.name in page for path in folders)

    before = {path: (path / "metrics.jsonl").stat().st_mtime_ns for path in folders}
    adapter = (folders[0] / "adapter" / "adapter_model.safetensors").read_bytes()
    for name in ("verdict.json", "checkpoints/step=00000002.ckpt"):
        (folders[0] / name).unlink()
    shutil.rmtree(folders[0] / "adapter")
    sweep(*asked)
    said = capfd.readouterr()
    assert said.out.count(" is there: ") == 1
    assert "Going on from" in said.out + said.err
    changed = {path.name for path in folders if (path / "metrics.jsonl").stat().st_mtime_ns != before[path]}
    assert changed == {folders[0].name}
    assert (folders[0] / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert len(list(Path("runs/sweep").iterdir())) == 4, "no run began anew"

    with pytest.raises(SystemExit, match="1"):
        sweep("model.lora.r=2,8", *FIT)
    assert "holds a sweep of other settings" in capfd.readouterr().err


def test_a_run_that_fails_does_not_end_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": 1}\n')
    with pytest.raises(SystemExit, match="1"):
        sweep("data.train=bad.jsonl,train.jsonl", "--output=both", *(a for a in FIT if "data.train" not in a))
    said = capfd.readouterr()
    assert "train=bad.jsonl " in said.out
    assert "failed (exit code 1)" in said.out
    assert "1 of 2 runs ended with an error: train=bad.jsonl" in said.err
    assert read_outcome("both/02,train=train.jsonl").result == "proved"  # type: ignore[union-attr]


def test_a_search_that_is_killed_goes_on_with_the_trials_it_would_have_had(capfd: pytest.CaptureFixture[str]) -> None:
    asked = ("model.optimization.learning_rate=1e-5..1e-2", "model.lora.target_modules=[all-linear,[q_proj,v_proj]]",
             "model.lora.r=2..8", "--trials=2", "--seed=5", *FIT)  # fmt: skip
    command = [sys.executable, "-m", "lit_lora", "sweep", *asked]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    assert killed.stdout is not None
    assert any("=== run 2 of 2" in line for line in killed.stdout)  # waits for it
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    record = Path("runs/sweep/trials.json")
    first, second = json.loads(record.read_text())
    (folder,) = Path("runs/sweep").glob("01,*")
    before = (folder / "metrics.jsonl").stat().st_mtime_ns

    record.write_text(json.dumps([first]))  # as if it had been killed a moment earlier
    sweep(*asked)
    said = capfd.readouterr().out
    assert json.loads(record.read_text()) == [first, second]
    assert said.count(" is there: ") == 1
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before
    names = [path.name for path in sorted(Path("runs/sweep").glob("0*"))]
    assert [name.split(",")[:2] for name in names] == [
        [f"{number:02d}", f"learning_rate={values[0]}"] for number, values in enumerate((first, second), 1)
    ]
    assert len(said[said.index("validation loss") :].splitlines()[1:3]) == 2
    page = Path("runs/sweep/report.html").read_text()
    assert all(name in page for name in names)


def test_a_second_sweep_in_one_folder_is_turned_away_while_the_first_goes_on() -> None:
    command = [sys.executable, "-m", "lit_lora", "sweep", "model.lora.r=2,4", *FIT, "--trainer.max_steps=100000"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    try:
        assert first.stdout is not None
        assert any("=== run 1 of 2" in line for line in first.stdout)  # waits for it
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode == 1
        assert f"the sweep in runs/sweep is going on (process {first.pid} on " in second.stderr
        assert "give --output another folder" in second.stderr
        assert "=== run" not in second.stdout
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    from lit_lora.tools.sweep import _claimed

    with _claimed(Path("runs/sweep")):
        pass  # a killed one leaves nothing to clear away
    assert not Path("runs/sweep/.lock").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing varies"),
        (["model.lora.r"], "expected a setting and its values"),
        (["model.lora.r="], "expected a setting and its values"),
        (["model.lora.r=[2"], "not a list of values"),
        (["model.lora.r=2,4", "model.lora.r=8"], "model.lora.r is given twice"),
        (["model.lora.r=2,4", "--model.lora.r=8"], "model.lora.r is given twice"),
        (["model.lora.r=2,2"], "stands there twice"),
        (["model.lora.r=2..8"], "a range is searched by a number of runs: give --trials 20, or list the values to try"),
        (["model.lora.r=8..2", "--trials=2"], "expected the lower end of a range first"),
        (["model.lora.r=2..8", "--trials=0"], "expected a whole number from 1 up, got 0"),
        (["model.lora.r=2..8", "--trials=2000"], "2,000 runs"),
        (["model.lora.r=2,8", "--seed=1"], "only a search has one"),
        (["model.lora.r=-1..8", "--trials=2"], "r must be"),
        (["model.lora.r=2..8", "model.lora.lora_dropout=0.0..1.5", "--trials=2"], "dropout"),
        (["trainer.default_root_dir=a,b"], "folders of their own"),
        (["model.lora.r=2,4", "--ckpt_path=last"], "folders of their own"),
        (["model.lora.rank=2,4"], "rank"),
        (["model.lora.r=2,-1"], "r must be"),
        (["model.lora.r=2,4", "--trainer.max_stps=3"], "max_stps"),
        (["model.lora.r=" + ",".join(map(str, range(1, 1002)))], "1,001 runs"),
    ],
)
def test_mistakes_are_named_before_the_first_run(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sweep(*words, *FIT)
    assert said in capfd.readouterr().err
    assert not Path("runs").exists()
