"""``lit-lora verify``: a run is repeated, and whatever was changed afterwards is found, with its sums or without."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_lora.runs.sha256sums import write_sums
from tests.promises.sentences import PROJECT
from tests.started_runs import fit, lit_lora, make_base, write_rows

# Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

ROWS = [{"prompt": f"what is {n} and {n}", "completion": f"it is {n + n}"} for n in range(24)]
OPTIONS = {"checkpoint__every_n_steps": 3, "checkpoint__keep_last": 9, "model__lora__lora_dropout": 0.1}


class Made:
    """A run with all that it is made from, to be spoilt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "run"

    def make(self, **options: object) -> None:
        base = make_base(self.folder / "base")
        fit(base, write_rows(self.folder / "rows.jsonl", ROWS), self.run, max_steps=9, **{**OPTIONS, **options})

    def verify(self, *arguments: object) -> int:
        try:
            lit_lora("verify", self.run, *arguments)
        except SystemExit as error:
            return int(error.code or 0)
        return 0


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = Made(tmp_path_factory.mktemp("made"))
    made.make()
    return made


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    """A copy of the folder; the config names what lies in the copy."""
    copy = Made(Path(shutil.copytree(original.folder, tmp_path / "copy")))
    config = copy.run / "config.yaml"
    config.write_text(config.read_text().replace(str(original.folder), str(copy.folder)))
    write_sums(copy.run)
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_repeats_bit_for_bit_and_is_only_read(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(made.run)
    assert made.verify("--steps", 4, "--places", 9) == 0
    out = capsys.readouterr().out
    assert "lit_lora: verified" in out
    for steps in ("1-3", "4-6", "7-9"):
        assert re.search(rf"steps {steps} +losses, norms and tokens repeated bit for bit, and the weights", out)
    assert contents(made.run) == before


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def _metrics(made: Made) -> None:
    lines = (made.run / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        if entry.get("loss"):
            entry["loss"] *= 0.9
    (made.run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _data(made: Made) -> None:
    write_rows(made.folder / "rows.jsonl", [*ROWS[:-1], {"prompt": "what is 23 and 23", "completion": "it is 47"}])


def _config(made: Made) -> None:
    path = made.run / "config.yaml"
    text, count = re.subn(r"learning_rate: 0\.02\b", "learning_rate: 0.01", path.read_text())
    assert count
    path.write_text(text)


def _checkpoint(made: Made) -> None:
    path = made.run / "checkpoints" / "step=00000006.ckpt"
    content = torch.load(path, weights_only=True)
    next(iter(content["state_dict"].values())).view(torch.int32)[0, 0] ^= 1
    torch.save(content, path)


FORGED: dict[str, tuple[Callable[[Made], None], str]] = {
    "a data row": (_data, "the training data and the validation data are not|it has changed since the checkpoint"),
    "a bit of the adapter": (lambda made: _flip(made.run / "adapter/adapter_model.safetensors", -1), "adapter +FAILED"),
    "a bit of a checkpoint": (_checkpoint, "checkpoints +FAILED"),
    "a bit of the base": (lambda made: _flip(made.folder / "base" / "model.safetensors", -3), "base"),
    "the learning rate": (_config, "the first that differs: learning_rate"),
    "the metrics": (_metrics, "metrics +FAILED"),
}  # fmt: skip


@pytest.mark.parametrize("start", ["its beginning", "a checkpoint"])
@pytest.mark.parametrize("what", FORGED)
def test_a_change_is_found_even_with_its_sums(what: str, start: str, made: Made, capsys, monkeypatch) -> None:
    change, said = FORGED[what]
    change(made)
    write_sums(made.run)  # by a forger, who knows of them
    if start == "its beginning":
        monkeypatch.setattr("random.Random.sample", lambda _, places, k: [0])
    else:
        monkeypatch.setattr("random.Random.sample", lambda _, places, k: [3])
    assert made.verify("--steps", 3, "--places", 1, "--seed", 0) == 3
    out = capsys.readouterr().out
    assert "lit_lora: NOT VERIFIED" in out
    assert re.search(said, out)


@pytest.mark.ddp
def test_what_two_processes_did_is_repeated_by_one(tmp_path: Path, capsys) -> None:
    made = Made(tmp_path)
    base = make_base(tmp_path / "base")
    options = {
        "config": "lora_standard.yaml", "model.base": base, "data.train": write_rows(tmp_path / "rows.jsonl", ROWS),
        "data.batch_size": 2, "data.cache_dir": tmp_path / "cache", "trainer.max_steps": 4, "trainer.devices": 2,
        "trainer.strategy": "ddp", "trainer.accelerator": "cpu", "trainer.default_root_dir": made.run,
        "convergence.min_decrease": -9.0, "report": "false",
    }  # fmt: skip
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_lora", "fit", *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert made.verify("--steps", 4) == 0
    out = capsys.readouterr().out
    assert "2 processes are repeated by one" in out
    assert re.search(r"steps 1-4 +losses, norms and tokens repeated within 2%, and the weights after step 4", out)


def test_a_file_that_changed_or_went_is_named(made: Made, capsys) -> None:
    _flip(made.run / "adapter" / "adapter_config.json", -2)
    (made.run / "adapter" / "README.md").unlink()
    made.verify("--steps", 1, "--places", 1)
    out = capsys.readouterr().out
    assert "adapter/README.md is gone" in out
    assert "adapter/adapter_config.json has changed" in out


def test_elsewhere_it_is_compared_within_a_tolerance_that_is_said(made: Made, capsys) -> None:
    path = made.run / "circumstances.json"
    path.write_text(re.sub(r'"processor": ".*"', '"processor": "Another"', path.read_text()))
    write_sums(made.run)
    assert made.verify("--steps", 2, "--places", 1) == 0
    out = capsys.readouterr().out
    assert "compared within 2%: processor was Another" in out
    assert "repeated within 2%" in out


def test_a_run_that_was_stopped_is_repeated_but_has_no_files_to_compare(made: Made, capsys) -> None:
    for name in ("SHA256SUMS", "verdict.json"):
        (made.run / name).unlink()
    assert made.verify("--steps", 2, "--places", 1) == 0
    assert "the run has not come to its end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere is not the folder of a run"), ([".", "--steps", "0"], "steps must be at least 1, got 0")],
)
def test_a_mistake_is_named(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        lit_lora("verify", *arguments)
    assert message in capsys.readouterr().err
