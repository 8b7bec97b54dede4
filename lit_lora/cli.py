"""``lit-lora fit|validate|test|predict``: a LightningCLI with the proving callbacks wired in.

Each callback has a stable key (``--convergence.min_decrease 0.4``), so that a config file only says what differs.
``fit`` writes one run folder, ``trainer.default_root_dir``: the resolved config, checkpoints, metrics, the adapter. A
new run never writes into the folder of an earlier one: it takes the next free name.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_lora.atomic import atomic_write
from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    MemoryProfiler,
    ThroughputLogger,
    TrainingCheckpoint,
)
from lit_lora.checkpoint import AtomicCheckpointIO, newest_checkpoint
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.module import LoRALightningModule
from lit_lora.run_record import PredictionWriter, RunRecord

RUN_FOLDER_VARIABLE = "LIT_LORA_RUN_FOLDER"
"""Tells the processes that a distributed run starts which folder the first one chose."""

SHIPPED = Path(str(resources.files("lit_lora.configs")))
"""Where configs and data that come with the package lie."""

CALLBACKS = {
    "gradient_norm": GradientNormLogger,
    "memory": MemoryProfiler,
    "convergence": ConvergenceAssertion,
    "gradient_flow": GradientFlowAssertion,
    "throughput": ThroughputLogger,
    "export": HFAdapterExport,
    "checkpoint": TrainingCheckpoint,
}


def run(arguments: Sequence[str]) -> None:
    """Parse a command line, verb first, and run it."""
    sys.argv = ["lit-lora", *_with_shipped_configs(arguments)]
    LoRACLI(
        LoRALightningModule,
        SFTDataModule,
        parser_class=_Parser,
        save_config_callback=None,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        trainer_defaults={
            "default_root_dir": "runs/run",
            "use_distributed_sampler": False,
            "enable_model_summary": False,
            "enable_checkpointing": True,
            "log_every_n_steps": 10,
            "num_sanity_val_steps": -1,  # the whole validation set once before training: the loss to compare with
        },
        parser_kwargs={"prog": "lit-lora", "env_prefix": "LIT_LORA", "default_env": True},
    )


class LoRACLI(LightningCLI):
    """The command line of a fine-tuning run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give every proving callback its key."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, find the checkpoint to resume from, and set what callbacks cannot."""
        verb = self.config["subcommand"]
        config = self.config[verb]
        for key in ("train", "validation", "test"):
            if config.data.get(key):
                config.data[key] = _shipped(config.data[key]) or config.data[key]
        config.ckpt_path = _checkpoint_to_load(config.get("ckpt_path"), config.trainer.default_root_dir)
        if verb == "fit":
            config.trainer.default_root_dir = _run_folder(config.trainer.default_root_dir, config.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the record of the run, a logger into its folder, and atomic checkpoints."""
        trainer = self._get(self.config_init, "trainer")
        folder = trainer["default_root_dir"]
        if trainer.get("logger") is None:
            trainer["logger"] = CSVLogger(folder, name="logs") if self.subcommand == "fit" else False
        plugins = trainer.get("plugins") or []
        trainer["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        self.record = RunRecord()
        extra = [self.record] if self.subcommand == "fit" else []
        if self.subcommand == "predict":
            extra.append(PredictionWriter())
        trainer["callbacks"] = [*(trainer.get("callbacks") or []), *extra]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Write the resolved config into the run folder."""
        self._write_config(Path(self.trainer.default_root_dir))

    def after_fit(self) -> None:
        """Say what the run proved, and where its results are."""
        self.record.conclude(self.trainer)

    @rank_zero_only
    def _write_config(self, folder: Path) -> None:
        self._dump_config()
        text = _yaml(self.config_dump)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            earlier = len(list(folder.glob("config.*.yaml"))) + 1
            path.rename(folder / f"config.{earlier}.yaml")
        atomic_write(path, lambda file: file.write(text.encode()))


class _Parser(LightningArgumentParser):
    """Errors in one line, with a suggestion."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get("LIT_LORA_TRACEBACK") and ex is not None:
            raise ex
        text = " ".join(str(message).split())
        print(f"lit-lora: error: {text}{_suggestion(text, self)}", file=sys.stderr)
        raise SystemExit(2)


def _suggestion(message: str, parser: LightningArgumentParser) -> str:
    quoted = re.findall(r"""[`'"]-{0,2}([\w.]+)[`'"]|--([\w.]+)""", message)
    words = [first or second for first, second in quoted]
    known = sorted({action.dest for action in parser._actions if action.dest})
    for word in words:
        candidates = {*known, *(key.rpartition(".")[2] for key in known), *CALLBACK_NAMES}
        if word in candidates:
            continue
        close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.7)
        if close:
            return f". Did you mean {close[0]!r}?"
    return ""


CALLBACK_NAMES = [callback.__name__ for callback in CALLBACKS.values()]


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(config, sort_keys=False)


def _with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """``--config quickstart.yaml`` finds the file that ships with the package where there is no such file here."""
    resolved = list(arguments)
    for index, argument in enumerate(resolved):
        flag, _, value = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if not value and index + 1 < len(resolved):
            resolved[index + 1] = _find_config(resolved[index + 1])
        elif value:
            resolved[index] = f"{flag}={_find_config(value)}"
    return resolved


def _find_config(name: str) -> str:
    if Path(name).exists() or not name.endswith((".yaml", ".yml")):
        return name
    if shipped := _shipped(name):
        return shipped
    known = [str(path.relative_to(SHIPPED)) for path in sorted(SHIPPED.rglob("*.yaml"))]
    close = difflib.get_close_matches(name.removeprefix("configs/"), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"shipped are {', '.join(known)}"
    raise FileNotFoundError(f"no config file {name}: {hint}")


def _shipped(name: str) -> str | None:
    """The file of that name that comes with the package, where there is none here."""
    path = SHIPPED / name.removeprefix("configs/")
    return str(path) if not Path(name).exists() and path.is_file() else None


def _checkpoint_to_load(ckpt_path: str | None, folder: str) -> str | None:
    if ckpt_path is None or os.environ.get(RUN_FOLDER_VARIABLE):
        return os.environ.get("LIT_LORA_CKPT_PATH", ckpt_path)
    path = Path(ckpt_path)
    if ckpt_path == "last":
        path = Path(folder) / "checkpoints"
    if path.is_dir():
        newest, problems = newest_checkpoint(path)
        for problem in problems:
            rank_zero_warn(f"Skipped: {problem}")
        if newest is None:
            raise FileNotFoundError(f"no complete checkpoint in {path}: leave out --ckpt_path to start a new run")
        path = newest
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give a file, a folder of them, or 'last'")
    os.environ["LIT_LORA_CKPT_PATH"] = str(path)
    return str(path)


def _run_folder(folder: str, ckpt_path: str | None) -> str:
    if chosen := os.environ.get(RUN_FOLDER_VARIABLE):
        return chosen
    path = Path(folder)
    if ckpt_path is None:
        number = 1
        while (path / "config.yaml").exists():
            number += 1
            path = Path(f"{folder}-{number}")
        if number > 1:
            rank_zero_info(f"{folder} holds an earlier run: this one goes to {path}")
    os.environ[RUN_FOLDER_VARIABLE] = str(path)
    return str(path)
