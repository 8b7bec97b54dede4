"""``lit-lora push`` sends a finished adapter to a Hub that listens on this machine, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftConfig
from safetensors.torch import load_file, save_file

from lit_lora.__main__ import main
from lit_lora.callbacks.verdict import Verdict
from lit_lora.report.outcome import read_outcome
from tests.promises.sentences import PROJECT
from tests.started_runs import fit, make_base, questions
from tests.tools.hub import TOKEN, Hub, hub_here

pytestmark = [
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of Lightning, about loggers, workers and short runs
    # huggingface_hub 2.4 uploads large files in a way that its HTTP client deprecates.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

WEIGHTS, CARD, CONFIG = "adapter_model.safetensors", "README.md", "adapter_config.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("push")
    base = make_base(folder / "base")
    fit(base, questions(folder / "data.jsonl"), folder / "run", max_steps=6, report="false")
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_here() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # read from HF_ENDPOINT when it is imported
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers have a protocol of their own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def push(*arguments: object) -> None:
    main(["push", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit):
        push(*arguments)
    return capsys.readouterr().err


def failed(run: Path) -> None:
    outcome = read_outcome(run)
    replace(outcome, verdicts=[*outcome.verdicts, Verdict("convergence", False, "it did not fall", True)]).save(run)


@pytest.mark.parametrize("of", [".", "adapter"])
def test_the_adapter_of_a_run_arrives_with_its_card(hub: Hub, run: Path, capsys, of: str) -> None:
    (run / "adapter/.hidden").write_text("mine")
    (run / "adapter/last.ckpt").write_text("mine")
    push(run / of, "someone/tuned", "--private", "--message", "The first one")
    (commit,) = hub.commits["someone/tuned"]
    assert hub.private["someone/tuned"]
    assert (commit.branch, commit.message) == ("main", "The first one")
    folder = run / "adapter"
    assert commit.files == {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".hidden", "last.ckpt")
    }
    assert commit.files.keys() >= {WEIGHTS, CARD, CONFIG, "tokenizer.json"}
    out = capsys.readouterr().out
    assert f"{hub.url}/someone/tuned at {commit.oid}" in out
    assert "which others do not have" in out  # its base is a folder


def test_it_goes_to_a_branch_and_a_second_time(hub: Hub, run: Path) -> None:
    push(run, "someone/tuned")
    push(run, "someone/tuned", "--revision", "v2")
    push(run, "someone/tuned", "--revision", "v2")
    assert [commit.branch for commit in hub.commits["someone/tuned"]] == ["main", "v2", "v2"]


def test_an_exported_folder_gets_the_card_that_it_lacks(hub: Hub, run: Path, tmp_path: Path, capsys) -> None:
    main(["export", str(run / "adapter"), str(tmp_path / "out")])
    (tmp_path / "out" / CARD).unlink(missing_ok=True)
    push(tmp_path / "out", "someone/tuned")
    (commit,) = hub.commits["someone/tuned"]
    assert commit.files[CARD].startswith(b"---\nlibrary_name: peft")
    assert "nothing is known of how it was trained" in capsys.readouterr().out
    (tmp_path / "back").mkdir()
    for name, content in commit.files.items():
        (tmp_path / "back" / name).write_bytes(content)
    assert PeftConfig.from_pretrained(str(tmp_path / "back")).r == 16


def test_a_run_that_is_not_proved_needs_a_word(hub: Hub, run: Path, capsys) -> None:
    failed(run)
    for source in (run, run / "adapter"):
        assert "is not proved: convergence. --not_proved true sends" in refused(capsys, source, "someone/tuned")
    assert hub.private == {}
    push(run, "someone/tuned", "--not_proved")
    assert len(hub.commits["someone/tuned"]) == 1
    assert "its run is not proved: convergence" in capsys.readouterr().out


def without_verdict(run: Path) -> None:
    (run / "verdict.json").unlink()


def without_adapter(run: Path) -> None:
    shutil.rmtree(run / "adapter")


def cut_short(run: Path) -> None:
    path = run / "adapter" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def without_weights(run: Path) -> None:
    (run / "adapter" / WEIGHTS).unlink()


def with_nan(run: Path) -> None:
    path = run / "adapter" / WEIGHTS
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(path).items()}
    save_file(tensors, path)


def other_config(run: Path) -> None:
    path = run / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "IA3"}))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (without_verdict, "has not come to its end"),
        (without_adapter, "has written no adapter yet"),
        (cut_short, WEIGHTS),
        (without_weights, WEIGHTS),
        (with_nan, "NaN"),
        (other_config, "IA3"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_is_no_finished_adapter_is_not_sent(
    hub: Hub, run: Path, capsys, harm: Callable[[Path], None], words
) -> None:
    harm(run)
    assert words in refused(capsys, run, "someone/tuned", "--not_proved")
    assert hub.private == {}


def test_what_the_hub_refuses_is_said(hub: Hub, run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "OWNER/NAME on the Hub, got 'tuned'" in refused(capsys, run, "tuned")
    push(run, "someone/public")
    assert "is there already, and public" in refused(capsys, run, "someone/public", "--private")
    assert len(hub.commits["someone/public"]) == 1
    hub.loses_a_byte = True
    assert f"{WEIGHTS} on the Hub is not what was sent" in refused(capsys, run, "someone/public")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "the Hub did not answer" in refused(capsys, run, "someone/public")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "(401): log in with `hf auth login`" in refused(capsys, run, "someone/other")


def test_the_endpoint_is_that_of_the_environment(hub: Hub, run: Path) -> None:
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(PROJECT),
        "PATH": "/usr/bin:/bin",
        "HOME": str(run),
    }
    command = [sys.executable, "-m", "lit_lora", "push", str(run), "someone/tuned"]
    subprocess.run(command, env=env, check=True, timeout=250, capture_output=True)
    assert len(hub.commits["someone/tuned"]) == 1
