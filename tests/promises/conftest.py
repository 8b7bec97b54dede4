"""A stranger at the command line: a tiny model, a few rows, and ``lit-lora`` run in this process."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lit_lora.__main__ import TRAINER_VERBS, main
from lit_lora.base.known_models import KNOWN_MODELS, MANIFEST
from lit_lora.metrics import TrainingMetrics
from tests.chat_tokenizers import CHATML, TOKENS, chat_tokenizer
from tests.promises.blocks import blocks
from tests.small_adapters import MERGES, SIZE
from tests.started_runs import make_base
from tests.tiny import config

NUM_ROWS = 40
(MODEL,) = KNOWN_MODELS


class Ran(NamedTuple):
    """A verb that has ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def headline(self) -> str:
        """What the run says of itself."""
        lines = [line for line in self.out.splitlines() if line.startswith("lit_lora: ")]
        return lines[-1].removeprefix("lit_lora: ") if lines else ""


class Stranger:
    """Runs verbs in an empty folder with ``base.json``, ``data.jsonl`` and options of a fit that takes a second."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capfd = capfd
        config("Llama", vocab_size=260, initializer_range=0.2).save_pretrained(folder / "base")
        rows = [{"prompt": f"say {i}", "completion": f"it is {i * i}"} for i in range(NUM_ROWS)]
        self.write("data.jsonl", rows)
        self.options: dict[str, Any] = {
            "model.base": "random:base",
            "model.optimization.learning_rate": 0.01,
            "model.lora.r": 4,
            "data.train": "data.jsonl",
            "data.tokenizer": "bytes",
            "data.cache_dir": "cache",
            "data.batch_size": 2,
            "trainer.max_steps": 4,
            "trainer.accelerator": "cpu",
            "trainer.enable_progress_bar": "false",
            "trainer.default_root_dir": "run",
            "convergence.min_decrease": 0.0,
            "checkpoint.every_n_steps": 2,
        }

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def arguments(self, **changed: Any) -> list[str]:
        """Of a fit; ``model__lora__r=8`` changes an option, None leaves it out."""
        given = {**self.options, **{name.replace("__", "."): value for name, value in changed.items()}}
        pairs = [(f"--{name}", str(value)) for name, value in given.items() if value is not None]
        return [part for pair in pairs for part in pair]

    def run(self, *arguments: object) -> Ran:
        """Run a verb."""
        self.capfd.readouterr()
        code: Any = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code or 0
        out, err = self.capfd.readouterr()
        assert "Traceback" not in err
        return Ran(code, out, err)

    def fit(self, verb: str = "fit", **changed: Any) -> Ran:
        """Run a fit, or a verb with the same options."""
        return self.run(verb, *self.arguments(**changed))

    def options_of(self, verb: str) -> set[str]:
        """Without dashes, as ``--help`` shows them."""
        lines = re.findall(
            r"^\s+-.*", self.run(verb, "--help.all" if verb in TRAINER_VERBS else "--help").out, re.MULTILINE
        )
        return {option for line in lines for option in re.findall(r"--([\w.]+)", line.split("  ")[0] or line)}

    def record(self, name: str, run: str = "run") -> Any:
        """A JSON file of a run."""
        return json.loads((self.folder / run / name).read_text())

    def metrics(self, run: str = "run") -> TrainingMetrics:
        """The metrics of a run."""
        return TrainingMetrics.load(self.folder / run / "metrics.jsonl")

    def contents(self, run: str = "run") -> dict[str, bytes]:
        """All files of a run."""
        folder = self.folder / run
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Stranger:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-lora"])
    return Stranger(tmp_path, capfd)


@pytest.fixture
def reader(stranger: Stranger, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    """Someone who follows a page: with data of their own, and a tiny model in the place of the quickstart's."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\n"))  # said to a chat
    home = stranger.folder / "home"
    monkeypatch.setenv("LIT_LORA_HOME", str(home))
    monkeypatch.setenv("LIT_LORA_CACHE", str(stranger.folder / "cache"))
    folder = home / "models" / MODEL
    make_base(folder, CHATML, num_hidden_layers=2, vocab_size=SIZE, eos_token_id=SIZE - len(TOKENS))
    chat_tokenizer(CHATML, merges=MERGES).save_pretrained(folder)
    (stranger.folder / "tiny").symlink_to(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"bytes": sizes}))
    line = json.loads(blocks("README.md", "json")[0].text)
    rows = [line, *({"prompt": f"{n} + {n}?", "completion": f"{n + n}"} for n in range(60))]
    stranger.write("my.jsonl", rows)
    stranger.write("held_out.jsonl", rows[:6])
    stranger.write("general.jsonl", [{"text": "The quick brown fox jumps over the lazy dog."}])
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "?"} for row in rows]
    stranger.write("pairs.jsonl", pairs)
    stranger.write("test.jsonl", rows[:4])
    (stranger.folder / "prompts.jsonl").write_text(blocks("docs/inference.md", "json")[0].text)
    text = "".join(f'"{row["prompt"]}","{row["completion"]}"\n' for row in rows)
    (stranger.folder / "my.csv").write_text(f"asked,said\n{text}")
    return stranger


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Let the run end, as if killed, when a function of a class is called."""

    class Killed(BaseException):
        pass

    def at(target: str) -> Any:
        def die(*_: Any, **__: Any) -> None:
            raise Killed

        monkeypatch.setattr(target, die)
        return pytest.raises(Killed)

    return at
