"""``lit-lora sweep``: every combination once, the finished ones never again, and a comparison at the end."""

from __future__ import annotations

import json
import shutil
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
