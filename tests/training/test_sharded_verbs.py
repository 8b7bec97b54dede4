"""A model whose base is divided, at work: every verb that runs one gives what it gives in one process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from lit_lora.__main__ import main
from tests.started_runs import ANSWERS, fit, make_base, questions, write_rows

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


class Trained:
    """A tiny model that has learned answers of several lengths, a new token in one, to an odd number of questions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_base(folder / "base", num_hidden_layers=3)
        train = questions(folder / "train.jsonl")
        self.adapter = fit(self.base, train, folder / "run", max_steps=25, **{"data__new_tokens+": "maybe"})
        (self.checkpoint,) = (folder / "run" / "checkpoints").glob("*.ckpt")
        rows = [{"prompt": prompt, "completion": answer} for prompt, answer in ANSWERS.items()]
        self.data = write_rows(folder / "data.jsonl", [*rows, {"prompt": "say five", "completion": "a long answer"}])

    def verbs(self, name: str, trainer: list[str]) -> list[list[str]]:
        """Command lines of all verbs; their files go into a folder of that name."""
        out = self.folder / name
        lightning = [
            *("--model.base", self.base, "--model.lora.r", "16", "--ckpt_path", str(self.checkpoint)),
            *("--data.train", self.data, "--data.validation", self.data, "--data.test", self.data),
            *("--data.new_tokens+", "maybe"),
            *("--data.cache_dir", str(self.folder / "cache"), "--trainer.accelerator", "cpu"),
            *("--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(out), *trainer),
        ]
        asked = ["--adapter", str(self.adapter), "--max_new_tokens", "12"]
        four_bits = ["--quantization.bits", "4", "--quantization.block_size", "32"]
        return [
            *([verb, *lightning] for verb in ("validate", "test", "predict")),
            ["evaluate", *asked, "--data", self.data, "--output", str(out / "scores.json")],
            ["generate", *asked, "--prompt", "say three", "--stream", "false"],
            ["generate", *asked, "--prompt", "say two", "--temperature", "1", "--seed", "3", *four_bits],
        ]

    def answers(self, name: str) -> list[str]:
        files = sorted((self.folder / name).glob("predictions*.jsonl"))
        assert files
        return sorted(line for file in files for line in file.read_text().splitlines())

    def scores(self, name: str) -> object:
        return json.loads((self.folder / name / "scores.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit-lora"])
        yield Trained(tmp_path_factory.mktemp("verbs"))
    torch.set_num_threads(threads)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in listening]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def metrics(output: str) -> dict[str, float]:
    found = re.findall(r"((?:val|test)_\w+) +│ +([0-9.]+)", output)
    assert len(found) == 6
    return {name: float(value) for name, value in found}


def test_every_verb_gives_what_it_gives_in_one_process(trained, capsys):
    """Also where one process has its answers sooner than the other."""
    for arguments in trained.verbs("one", []):
        main(arguments)
    alone = capsys.readouterr().out
    divided = trained.verbs("two", ["--trainer.devices", "2", "--trainer.strategy", "lora_sharded"])
    in_turn = list(zip(free_ports(len(divided)), divided, strict=True))
    done = torchrun("-m", "tests.training.verbs_in_turn", json.dumps(in_turn))
    assert done.returncode == 0, done.stderr[-4000:]
    assert metrics(done.stdout) == pytest.approx(metrics(alone), rel=1e-6)
    assert trained.answers("two") == trained.answers("one")
    assert trained.scores("two") == trained.scores("one")
    said = alone.splitlines()[-2:]  # the answers of generate
    assert done.stdout.splitlines()[-2:] == said
    assert len(set(map(len, trained.answers("one")))) > 2


@pytest.mark.parametrize("verb", ["chat", "merge", "export"])
def test_verbs_that_work_in_one_process_say_so(monkeypatch, capsys, verb):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main([verb, "--adapter", "somewhere"])
    assert f"{verb} runs in one process: start it without torchrun" in capsys.readouterr().err
