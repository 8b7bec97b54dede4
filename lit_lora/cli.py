"""``lit-lora fit|validate|test|predict``: a LightningCLI with the proving callbacks wired in.

Each callback has a stable key (``--convergence.min_decrease 0.4``), so that a config file only says what differs.
``fit`` writes one run folder, ``trainer.default_root_dir``: the resolved config, checkpoints, metrics, the adapter. A
new run never writes into the folder of an earlier one: it takes the next free name.
"""

from __future__ import annotations

import glob
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_lora import strict_yaml
from lit_lora.atomic import atomic_write, make_folder
from lit_lora.callbacks import (
    ConvergenceAssertion,
    GradientFlowAssertion,
    GradientNormLogger,
    HFAdapterExport,
    MemoryProfiler,
    RankMonitor,
    ThroughputLogger,
    TrainingCheckpoint,
)
from lit_lora.checkpoint import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from lit_lora.command_line import in_order, without_contradictions
from lit_lora.config_check import DATA_KEYS, parser_of, problems_in, problems_of
from lit_lora.csv_log import PatientCSVLogger
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.module import LoRALightningModule
from lit_lora.parse_errors import reason
from lit_lora.run_record import PredictionWriter, RunRecord
from lit_lora.setting_check import known_settings, refuse
from lit_lora.shipped import shipped
from lit_lora.trainer_settings import check_trainer
from lit_lora.wording import for_command_line

RUN_FOLDER_VARIABLE = "LIT_LORA_RUN_FOLDER"
"""Tells the processes that a distributed run starts which folder the first one chose."""

CHECKPOINT_VARIABLE = "LIT_LORA_CKPT_PATH"
"""Likewise, which checkpoint to go on from; empty for none."""

CALLBACKS = {
    "gradient_norm": GradientNormLogger,
    "memory": MemoryProfiler,
    "convergence": ConvergenceAssertion,
    "gradient_flow": GradientFlowAssertion,
    "throughput": ThroughputLogger,
    "export": HFAdapterExport,
    "checkpoint": TrainingCheckpoint,
}

PARTS = {"trainer": check_trainer, "model": LoRALightningModule, "data": SFTDataModule, **CALLBACKS}
"""What checks the values of a config, by key."""


def run(arguments: Sequence[str]) -> None:
    """Parse a command line, verb first, and run it.

    Raises:
        ValueError: also for what Lightning calls a misconfiguration.
        KeyboardInterrupt: where Lightning would exit with 1 for Ctrl-C.
        SIGTERMException: for a termination.
    """
    _leave_out_noise()
    sys.argv = [sys.argv[0], *arguments]  # Lightning starts other ranks with this script
    inherited = {name: os.environ.get(name) for name in (RUN_FOLDER_VARIABLE, CHECKPOINT_VARIABLE)}
    try:
        _run()
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        for name, value in inherited.items():
            if value is None:
                os.environ.pop(name, None)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Lightning does so for NCCL only. At the interpreter's end gloo's threads now and then abort the process.
            torch.distributed.destroy_process_group()


def parse_fit(arguments: Sequence[str]) -> Any:
    """The settings of a ``fit`` with these arguments, config files read and defaults filled in. Nothing is run."""
    sys.argv = [sys.argv[0], "fit", *arguments]
    try:
        _run(_ParsingCLI)
    except _Parsed as parsed:
        return parsed.config
    raise AssertionError("the command line was run")


@for_command_line()
def _run(cli: type[LightningCLI] | None = None) -> None:
    (cli or LoRACLI)(
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
        parser_kwargs={"prog": "lit-lora"},
    )


class LoRACLI(LightningCLI):
    """The command line of a fine-tuning run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verb of this command line: a parser for each of the others would be built for nothing."""
        verbs = LightningCLI.subcommands()
        return {sys.argv[1]: verbs[sys.argv[1]]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give every proving callback its key."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Put the command line in order, parse it, then check the config as a whole."""
        verb, *rest = sys.argv[1:]
        unreadable: list[str] = []
        try:
            rest = in_order(rest)
            sys.argv[2:], notices = without_contradictions(rest, known_settings(parser_of(parser, verb)), unreadable)
        except ValueError as error:
            refuse([str(error)])
        if unreadable:
            refuse(problems_in(parser, sys.argv[1:], PARTS))
        for notice in notices:
            rank_zero_info(notice)
        super().parse_arguments(parser, args)
        self.check_config(self.config[self.config["subcommand"]], parser)

    def check_config(self, config: Any, parser: LightningArgumentParser) -> None:
        """Find shipped data, and refuse what no run can go well with.

        Raises:
            SystemExit: after listing all problems.
            ValueError: naming a checkpoint that cannot be read.
        """
        for key in DATA_KEYS:
            if config.get(key):
                config[key] = shipped(config[key]) or config[key]
        if found := problems_of(config, parser, sys.argv[1:], PARTS):
            refuse(found)
        if config.get("ckpt_path") and Path(config.ckpt_path).is_file():
            read_checkpoint(config.ckpt_path)  # before Lightning reads settings from it, with whatever error it meets

    def before_instantiate_classes(self) -> None:
        """Choose the run folder, and find the checkpoint to resume from."""
        verb = self.config["subcommand"]
        config = self.config[verb]
        config.ckpt_path = _checkpoint_to_load(config.get("ckpt_path"), _checkpoint_folders(config))
        if verb == "fit":
            config.trainer.default_root_dir = _run_folder(config.trainer.default_root_dir, config.ckpt_path)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the record of the run, a logger into its folder, and atomic checkpoints."""
        trainer = self._get(self.config_init, "trainer")
        folder = trainer["default_root_dir"]
        if trainer.get("logger") is None:
            trainer["logger"] = PatientCSVLogger(folder, name="logs") if self.subcommand == "fit" else False
        plugins = trainer.get("plugins") or []
        trainer["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        self.record = RunRecord()
        extra: list[Callback] = [RankMonitor()]
        if self.subcommand == "fit":
            extra += [self.record, ConfigWriter(self._write_config)]
        if self.subcommand == "predict":
            extra.append(PredictionWriter())
        trainer["callbacks"] = [*(trainer.get("callbacks") or []), *extra]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Validate where training did not end with it, then say what the run proved, and where its results are."""
        validated = [entry["step"] for entry in self.model.training_metrics.validation]
        if self.datamodule.validation_data is not None and self.trainer.global_step not in validated:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
            self.record.save(self.trainer, self.model)
        self._write_config(Path(self.trainer.default_root_dir))  # where no step was left to take, none is there yet
        self.record.conclude(self.trainer)

    @rank_zero_only
    def _write_config(self, folder: Path) -> None:
        self._dump_config()
        text = strict_yaml.dump(self.config_dump)
        make_folder(folder, option="trainer.default_root_dir")
        path = folder / "config.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            earlier = len(list(folder.glob("config.*.yaml"))) + 1
            path.rename(folder / f"config.{earlier}.yaml")
        atomic_write(path, lambda file: file.write(text.encode()))


class ConfigWriter(Callback):
    """Writes the config into the run folder, and so takes the folder, once data and checkpoint are accepted.

    A new run has nothing more to be refused for when its fit starts. A resumed one does until its training starts: the
    state of the optimizer is loaded late.
    """

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._write = write

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a new run: before its first validation, which may take minutes."""
        if trainer.ckpt_path is None:
            self._write(Path(trainer.default_root_dir))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write that of a resumed run."""
        self._write(Path(trainer.default_root_dir))


class _Parsed(Exception):
    """No error: it ends the command line before anything is built."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class _ParsingCLI(LoRACLI):
    def check_config(self, config: Any, parser: LightningArgumentParser) -> None:
        super().check_config(config, parser)
        raise _Parsed(config)


class _Parser(LightningArgumentParser):
    """Strict YAML, no abbreviated options, and one report of all that is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_mode": strict_yaml.install(), "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get("LIT_LORA_TRACEBACK") and ex is not None:
            raise ex
        if not self.exit_on_error:
            raise ValueError(message) from ex
        refuse(problems_in(self, sys.argv[1:], PARTS) or [reason(str(message))])


def _leave_out_noise() -> None:
    """Lightning's advertisements, and two remarks that it makes about itself, say nothing about the run."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(("💡", "`weights_only`")))
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)


def _checkpoint_folders(config: Any) -> list[Path]:
    """Where a run with this config may have left checkpoints: its own folder and the numbered ones after it."""
    if config.checkpoint.get("dirpath"):
        return [Path(config.checkpoint.dirpath)]
    root = Path(config.trainer.default_root_dir)
    numbered = [
        path for path in root.parent.glob(f"{glob.escape(root.name)}-*") if path.name[len(root.name) + 1 :].isdigit()
    ]
    return [path / "checkpoints" for path in (root, *numbered)]


def _checkpoint_to_load(ckpt_path: str | None, folders: Sequence[Path]) -> str | None:
    if ckpt_path is None or CHECKPOINT_VARIABLE in os.environ:
        return os.environ.get(CHECKPOINT_VARIABLE) or None
    path: Path | None = Path(ckpt_path)
    if ckpt_path == "last" or Path(ckpt_path).is_dir():
        folders = folders if ckpt_path == "last" else [Path(ckpt_path)]
        path, problems = newest_checkpoint(*folders)
        for problem in problems:
            rank_zero_warn(f"Skipped: {problem}")
        if path is None and problems:
            raise ValueError(f"no undamaged checkpoint in {_listed(folders)}: leave out --ckpt_path to start a new run")
        if path is None and ckpt_path != "last":
            raise FileNotFoundError(f"no checkpoint in {ckpt_path}: leave out --ckpt_path to start a new run")
        rank_zero_info(f"Going on from {path}" if path else f"No checkpoint in {_listed(folders)}: a new run starts")
    elif not Path(ckpt_path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give a file, a folder of them, or 'last'")
    os.environ[CHECKPOINT_VARIABLE] = str(path or "")
    return str(path) if path else None


def _listed(folders: Sequence[Path]) -> str:
    return " or ".join(str(folder) for folder in folders if folder.is_dir()) or str(folders[0])


def _run_folder(folder: str, ckpt_path: str | None) -> str:
    """The folder of the run that is resumed, else the next free one."""
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
    else:
        resumed = Path(ckpt_path).parent.parent
        if resumed.parent == path.parent and resumed.name.startswith(f"{path.name}-"):
            path = resumed
    os.environ[RUN_FOLDER_VARIABLE] = str(path)
    return str(path)
