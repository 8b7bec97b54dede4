"""What the fault suite runs: ``lit-lora fit`` on a tiny model in a forked process, and what it left behind."""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_lora.files.checkpoint import newest_checkpoint, read_checkpoint
from lit_lora.metrics import TrainingMetrics

STEPS = 24
LIMIT_S = 120.0
"""A run that takes longer hangs."""


@dataclass
class Tally:
    """Faults of one kind."""

    name: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def check(self, survived: bool, what: str) -> None:
        self.tried += 1
        if not survived:
            self.failures.append(what)
            print(f"FAILED {self.name}: {what}", flush=True)


class Budget:
    """Time for the whole suite: when it is over no new fault is started, and what was left out is counted."""

    def __init__(self, minutes: float) -> None:
        self.ends_s = time.monotonic() + 60 * minutes
        self.not_tried: dict[str, int] = {}

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends_s

    def allows(self, name: str, count: int = 1) -> bool:
        if self.is_over:
            self.not_tried[name] = self.not_tried.get(name, 0) + count
        return not self.is_over


class Process:
    """``lit-lora ARGUMENTS`` in a fork of this process."""

    def __init__(self, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None) -> None:
        self.log = log
        self.started_s = time.monotonic()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._child(arguments, prepare)

    def _child(self, arguments: list[str], prepare: Callable[[], None] | None) -> None:
        code = 1
        try:
            os.setsid()
            gc.callbacks.clear()  # of hypothesis: what a signal raises in one is printed, traceback and all
            with self.log.open("ab", buffering=0) as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            sys.__stderr__ = sys.stderr
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if prepare is not None:
                prepare()
            from lit_lora.__main__ import main

            main(arguments)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """Exit code; minus the signal that killed it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = None if pid == 0 else os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self) -> int | None:
        """As :meth:`poll`, but None only for a run that hangs, which is then killed."""
        while time.monotonic() - self.started_s < LIMIT_S:
            if (code := self.poll()) is not None:
                return code
            time.sleep(0.01)
        self.stop()
        return None

    def stop(self) -> None:
        """End it and what it has started."""
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Project:
    """A tiny model and its data, and how the undisturbed run ends."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaConfig

        self.folder = folder
        LlamaConfig(
            vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        ).save_pretrained(folder / "base")  # fmt: skip
        rows = [{"prompt": f"say {i} " * (i % 4 + 1), "completion": f"{i * i} it is"} for i in range(40)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        process = self.fit("whole", "whole")
        assert process.wait() == 0, process.text
        self.run_s = time.monotonic() - process.started_s
        self.expected = self.end("whole")
        self.expected_record = self.record("whole")

    def config(self, name: str) -> dict[str, Any]:
        return {
            "trainer": {
                "max_steps": STEPS, "accelerator": "cpu", "accumulate_grad_batches": 2, "enable_progress_bar": False,
                "default_root_dir": str(self.folder / name / "run"),
            },
            "model": {
                "base": f"random:{self.folder / 'base'}", "optimization": {"learning_rate": 0.01},
                "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
            },
            "data": {
                "train": str(self.folder / "train.jsonl"), "tokenizer": "bytes", "batch_size": 2,
                "validation_fraction": 0.1, "cache_dir": str(self.folder / "cache"),
            },
            "checkpoint": {"every_n_steps": 2},
            "convergence": {"min_decrease": -9.0},
            "export": {"every_n_steps": 2},
            "report": False,
        }  # fmt: skip

    def fit(
        self,
        name: str,
        log: str,
        *arguments: str,
        prepare: Callable[[], None] | None = None,
        train: Path | None = None,
        base: str | None = None,
        data: dict[str, Any] | None = None,
    ) -> Process:
        (self.folder / name).mkdir(exist_ok=True)
        path = self.folder / f"{name}.yaml"
        config = self.config(name)
        config["data"]["train"] = str(train or config["data"]["train"])
        config["data"] |= data or {}
        config["model"]["base"] = base or config["model"]["base"]
        path.write_text(yaml.safe_dump(config))
        return Process(["fit", "--config", str(path), *arguments], self.folder / f"{log}.log", prepare)

    def checkpoints(self, name: str) -> list[Path]:
        return sorted((self.folder / name).glob("run*/checkpoints"))

    def end(self, name: str) -> dict[str, Any]:
        newest, _ = newest_checkpoint(*self.checkpoints(name))
        assert newest is not None, f"{name}: no checkpoint"
        content = read_checkpoint(newest)
        steps = TrainingMetrics.load(newest.parent.parent / "metrics.jsonl").steps
        return {
            "global_step": content["global_step"],
            "state_dict": content["state_dict"],
            "optimizer": content["optimizer_states"],
            "schedule": content["lr_schedulers"],
            "metrics": [replace(step, step_time_s=0) for step in steps],
            "adapter": self.adapter(newest.parent.parent / "adapter"),
        }

    def adapter(self, folder: Path) -> dict[str, Any]:
        """What the exported adapter holds."""
        from safetensors.torch import load_file

        config = json.loads((folder / "adapter_config.json").read_text())
        return {"config": config, "tensors": load_file(folder / "adapter_model.safetensors")}

    def finished(self, name: str) -> list[Path]:
        """Folders of the runs that came to their end."""
        return sorted(path.parent for path in (self.folder / name).glob("run*/verdict.json"))

    def record(self, name: str) -> Any:
        """What the only finished run wrote down beside its checkpoints."""
        (folder,) = self.finished(name)
        metrics = TrainingMetrics.load(folder / "metrics.jsonl")
        with (folder / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
            rows = [(row["step"], row["train_loss"], row["val_loss"]) for row in csv.DictReader(file)]
        return [replace(step, step_time_s=0) for step in metrics.steps], metrics.validation, rows

    def leftovers(self, name: str) -> list[str]:
        """Temporary files in the folders of finished runs."""
        return [str(path) for folder in self.finished(name) for path in folder.rglob("*.partial")]

    def broken_files(self, name: str) -> list[str]:
        """Files under a final name that are not whole."""
        from safetensors.torch import load_file

        readers: dict[str, Callable[[Path], Any]] = {
            ".ckpt": read_checkpoint,
            ".safetensors": load_file,
            ".json": lambda path: json.loads(path.read_text()),
        }
        found = []
        for path in (self.folder / name).rglob("*"):
            if path.suffix in readers and path.is_file() and not path.name.startswith("."):
                try:
                    readers[path.suffix](path)
                except Exception as error:
                    found.append(f"{path}: {error}")
        return found


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second
