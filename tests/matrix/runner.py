"""Runs ``lit-lora fit`` with settings of the matrix, each in a fork of this process, as many at once as cores.

A process of its own: a fork of one that has used threads may hang, and imports are paid once.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.faults.runs import Process
from tests.matrix.settings import ALONE, KILLED_ALONE, REFUSED, REFUSED_PAIRS, ROWS, Options, options_of
from tests.tiny import config

KILLED_IN_BATCH = 6
"""Of those that a run begins: inside an accumulation window of three, and between two validations."""


def case_names() -> list[str]:
    """Of all that is run."""
    pairs = [" x ".join(sorted(value for _, value in pair)) for pair in REFUSED_PAIRS]
    return [*(f"row {number}" for number in range(len(ROWS))), *ALONE, *(case.what for case in REFUSED), *pairs]


def _cases() -> dict[str, Options]:
    pairs = [options_of(dict(sorted(pair))) for pair in REFUSED_PAIRS]
    options = [*(options_of(row) for row in ROWS), *ALONE.values(), *(case.options for case in REFUSED), *pairs]
    return dict(zip(case_names(), options, strict=True))


class Project:
    """A tiny model, its data, and the settings that all runs have."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config("Llama", vocab_size=260, initializer_range=0.2, hidden_size=64).save_pretrained(folder / "base")
        rows = [{"prompt": f"say {i} " * (i % 4 + 1), "completion": f"{i * i} it is"} for i in range(40)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write_config(self, run: Path, options: Options) -> Path:
        """Everything in one file."""
        base: Options = {
            "model.base": f"random:{self.folder / 'base'}",
            "model.optimization.learning_rate": 0.01,
            "model.lora.r": 4,
            "data.train": str(self.folder / "train.jsonl"),
            "data.tokenizer": "bytes",
            "data.batch_size": 4,
            "data.validation_fraction": 0.2,
            "data.cache_dir": str(self.folder / "cache"),
            "trainer.accelerator": "cpu",
            "report": False,
            "trainer.enable_progress_bar": False,
            "trainer.default_root_dir": str(run),
            "trainer.val_check_interval": 4,
            "convergence.min_decrease": -1.0,  # six steps prove nothing about learning
        }
        if not any(key in options for key in ("trainer.max_epochs", "trainer.max_time")):
            base["trainer.max_steps"] = 6
        nested: dict[str, Any] = {}
        for key, value in {**base, **copy.deepcopy(options)}.items():
            *groups, name = key.split(".")
            place = nested
            for group in groups:
                place = place.setdefault(group, {})
            place[name] = value
        if isinstance(loggers := nested["trainer"].get("logger"), list):
            for logger in loggers:
                logger["init_args"]["save_dir"] = str(run)
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(nested))
        return path


def _die_in_a_batch() -> None:
    from lit_lora.training.token_loss import TokenLossModule

    step = TokenLossModule.training_step

    def dying(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.started == KILLED_IN_BATCH:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    TokenLossModule.training_step = dying  # type: ignore[method-assign]


def _run(project: Project, name: str, options: Options, killed: bool) -> Iterator[Process]:
    """One process after the other."""
    place = project.folder / name.replace("/", "-")
    place.mkdir()
    path = str(project.write_config(place / "whole", options))
    yield Process(["fit", "--config", path], place / "whole.log")
    if killed:
        path = str(project.write_config(place / "resumed", options))
        yield Process(["fit", "--config", path], place / "killed.log", _die_in_a_batch)
        yield Process(["fit", "--config", path, "--ckpt_path", "last"], place / "resumed.log")


def main(folder: str, names: list[str]) -> None:
    """Run these cases; their exit codes go to standard output."""
    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401 (paid once)

    import lit_lora.cli  # noqa: F401

    project, cases = Project(Path(folder)), _cases()
    rows = {f"row {number}" for number, row in enumerate(ROWS) if row["run"] == "killed and resumed"}
    killed = rows | KILLED_ALONE
    waiting = [_run(project, name, cases[name], name in killed) for name in names]
    labels = dict(zip(map(id, waiting), names, strict=True))
    codes: dict[str, list[int | None]] = {name: [] for name in names}
    running: list[tuple[Iterator[Process], Process]] = []
    while waiting or running:
        while waiting and len(running) < max(2, os.cpu_count() or 1):
            case = waiting.pop(0)
            running.append((case, next(case)))
        case, process = running.pop(0)
        codes[labels[id(case)]].append(process.wait())
        if (following := next(case, None)) is not None:
            running.insert(0, (case, following))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
