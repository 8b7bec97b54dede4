"""``lit-lora fit|validate|test|predict``: a LightningCLI with the proving callbacks wired in.

Each callback has a stable key (``--convergence.min_decrease 0.4``), so that a config file only says what differs.
``fit`` writes one run folder, ``trainer.default_root_dir``: the resolved config, checkpoints, metrics, the adapter. A
new run never writes into the folder of an earlier one: it takes the next free name.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

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
from lit_lora.callbacks._support.trainer import why_past_its_end, writes_files
from lit_lora.cli.command_line import in_order, without_contradictions
from lit_lora.cli.config_check import DATA_KEYS, parser_of, problems_in, problems_of
from lit_lora.cli.help import asked_part, show_help
from lit_lora.cli.outcome import Outcome, read_outcome
from lit_lora.cli.parse_errors import reason
from lit_lora.cli.run_folder import (
    CONFIG_NAME,
    RunFolder,
    find_checkpoint,
    new_run_folder,
    resumed_run_folder,
    run_folders,
)
from lit_lora.cli.run_record import PredictionWriter, RunRecord
from lit_lora.cli.setting_check import known_settings, refuse
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.files import strict_yaml
from lit_lora.files.atomic import atomic_write, make_folder
from lit_lora.files.checkpoint import AtomicCheckpointIO, read_checkpoint
from lit_lora.files.csv_log import PatientCSVLogger
from lit_lora.files.shipped import shipped
from lit_lora.module import LoRALightningModule
from lit_lora.training.trainer_settings import check_trainer, missing_end
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
        NotProvedError: for a check that ended the run.
        SystemExit: with a code of its own for a run that failed a check.
    """
    _leave_out_noise()
    sys.argv = [sys.argv[0], *arguments]  # Lightning starts other ranks with this script
    inherited = {name: os.environ.get(name) for name in (RUN_FOLDER_VARIABLE, CHECKPOINT_VARIABLE)}
    try:
        cli = _run()
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        if (path := os.environ.get(CHECKPOINT_VARIABLE)) and _is_of_loading(error):
            raise ValueError(f"{path} is not as lit_lora writes it: {type(error).__name__}: {error}") from error
        raise
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
    if cli.outcome is not None and cli.outcome.exit_code:
        raise SystemExit(cli.outcome.exit_code)


def parse_fit(arguments: Sequence[str]) -> Any:
    """The settings of a ``fit`` with these arguments, config files read and defaults filled in. Nothing is run."""
    sys.argv = [sys.argv[0], "fit", *arguments]
    try:
        _run(_ParsingCLI)
    except _Parsed as parsed:
        return parsed.config
    raise AssertionError("the command line was run")


@for_command_line()
def _run(cli: type[LoRACLI] | None = None) -> LoRACLI:
    return (cli or LoRACLI)(
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

    outcome: Outcome | None = None
    """How the run ended; of a fit, on its first process."""
    trains = True
    """Whether a fit is run, which must have an end, and not only parsed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Run the command line; see :func:`run`."""
        self.run_folder: RunFolder | None = None
        try:
            super().__init__(*args, **kwargs)
        finally:
            if self.run_folder is not None:
                self.run_folder.release()

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
        if (part := asked_part(rest)) is not None:
            show_help(parser_of(parser, verb), verb, part)
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
        found = problems_of(config, parser, sys.argv[1:], PARTS)
        if not found and self.trains and self.config["subcommand"] == "fit":
            found = missing_end(**vars(config.trainer))
        if found:
            refuse(found)
        if config.get("ckpt_path") and Path(config.ckpt_path).is_file():
            read_checkpoint(config.ckpt_path)  # before Lightning reads settings from it, with whatever error it meets

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint to resume from; choose the run folder and claim it.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if it cannot be gone on from.
        """
        verb = self.config["subcommand"]
        config = self.config[verb]
        if RUN_FOLDER_VARIABLE in os.environ:  # the first process of this run has chosen
            config.ckpt_path = os.environ[CHECKPOINT_VARIABLE] or None
            config.trainer.default_root_dir = os.environ[RUN_FOLDER_VARIABLE]
            return
        root, dirpath = config.trainer.default_root_dir, config.checkpoint.get("dirpath")
        found = find_checkpoint(config.ckpt_path, root, dirpath) if config.get("ckpt_path") else None
        for problem in found.skipped if found is not None else []:
            rank_zero_warn(f"Skipped: {problem}")
        if config.get("ckpt_path") and found is None and verb != "fit":
            raise FileNotFoundError(
                f"no checkpoint in {' or '.join(map(str, run_folders(root)))}: give the file, or leave out "
                f"--ckpt_path to {verb} the base with untrained adapters"
            )
        if found is not None:
            rank_zero_info(f"Going on from {found.checkpoint}")
        elif config.get("ckpt_path"):
            rank_zero_info(f"No checkpoint in {root}: a new run starts")
        config.ckpt_path = str(found.checkpoint) if found is not None else None
        if verb == "fit" and found is not None and found.folder is not None:
            _refuse_older(found.checkpoint, found.folder, config.trainer)
        if verb == "fit" and _is_first_process():
            resumed = found.folder if found is not None else None
            trial = bool(config.trainer.get("fast_dev_run"))
            config.trainer.default_root_dir = str(root if trial else self._claim(root, resumed))
        os.environ[CHECKPOINT_VARIABLE] = config.ckpt_path or ""
        os.environ[RUN_FOLDER_VARIABLE] = str(config.trainer.default_root_dir)

    def _claim(self, root: str, resumed: Path | None) -> Path:
        self.run_folder = new_run_folder(root) if resumed is None else resumed_run_folder(resumed)
        if resumed is None and self.run_folder.path != Path(root):
            rank_zero_info(f"{root} holds another run: this one goes to {self.run_folder.path}")
        return self.run_folder.path

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the record of the run, a logger into its folder, and atomic checkpoints."""
        trainer = self._get(self.config_init, "trainer")
        folder = trainer["default_root_dir"]
        if trainer.get("logger") is None:
            trainer["logger"] = PatientCSVLogger(folder, name="logs") if self.subcommand == "fit" else False
        plugins = trainer.get("plugins") or []
        trainer["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        self.record = RunRecord(is_over=self._is_over())
        extra: list[Callback] = [RankMonitor()]
        if self.subcommand == "fit":
            extra += [self.record, ConfigWriter(self._write_config)]
        if self.subcommand == "predict":
            extra.append(PredictionWriter())
        given = trainer.get("callbacks") or []
        trainer["callbacks"] = [*(given if isinstance(given, list) else [given]), *extra]
        if trainer.get("enable_checkpointing") is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Validate where training did not end with it, then say what the run proved, and where its results are."""
        folder = Path(self.trainer.default_root_dir)
        if self.record.finished(self.trainer) is None and not why_past_its_end(self.trainer):
            validated = [entry["step"] for entry in self.model.training_metrics.validation]
            if self.datamodule.validation_data is not None and self.trainer.global_step not in validated:
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
                self.record.save(self.trainer, self.model)
            self._write_config(folder)  # where no step was left to take, none is there yet
        self.outcome = self.record.conclude(self.trainer)

    def _is_over(self) -> bool:
        """Whether a run that something ended early is resumed just as it ended."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit" or not config.ckpt_path:
            return False
        folder = Path(config.trainer.default_root_dir)
        earlier = read_outcome(folder)
        if earlier is None or not (earlier.finished and earlier.stopped_early) or self._differs(folder / CONFIG_NAME):
            return False
        return read_checkpoint(config.ckpt_path)["global_step"] == earlier.step

    def _differs(self, path: Path) -> bool:
        """Whether a config that was written is another than that of this run, but for where it goes on from."""
        self._dump_config()
        try:
            written = strict_yaml.read(path)
        except (OSError, ValueError):
            return True
        return not isinstance(written, dict) or {**written, "ckpt_path": None} != {
            **self.config_dump,
            "ckpt_path": None,
        }

    def _write_config(self, folder: Path) -> None:
        path = folder / CONFIG_NAME
        if not writes_files(self.trainer) or not self._differs(path):
            return
        make_folder(folder, option="trainer.default_root_dir")
        if path.exists():
            earlier = len(list(folder.glob("config.*.yaml"))) + 1
            path.rename(folder / f"config.{earlier}.yaml")
        text = strict_yaml.dump(self.config_dump)
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
    trains = False

    def check_config(self, config: Any, parser: LightningArgumentParser) -> None:
        super().check_config(config, parser)
        raise _Parsed(config)


class _Parser(LightningArgumentParser):
    """Strict YAML, no abbreviated options, and one report of all that is wrong."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)  # fields of LoRAConfig and the like
        super().__init__(*args, **{"parser_mode": strict_yaml.install(), "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get("LIT_LORA_TRACEBACK") and ex is not None:
            raise ex
        if not self.exit_on_error:
            raise ValueError(message) from ex
        refuse(problems_in(self, sys.argv[1:], PARTS) or [reason(str(message))])


def _is_of_loading(error: Exception) -> bool:
    """Whether an error came up while a checkpoint was loaded, in Lightning's code or in ours."""
    files = (frame.filename for frame in traceback.extract_tb(error.__traceback__))
    return any(Path(name).name in ("checkpoint_connector.py", "training_state.py") for name in files)


# The default of an argument of `lightning.pytorch.callbacks.Timer`. YAML has no text for an enumeration of strings.
yaml.SafeDumper.add_representer(Interval, lambda dumper, value: dumper.represent_str(value.value))


def _refuse_older(checkpoint: Path, folder: Path, trainer: Any) -> None:
    """Refuse to end a finished run again, at an older step: its results would be replaced by earlier ones."""
    outcome = read_outcome(folder)
    if outcome is None or not outcome.finished:
        return
    content = read_checkpoint(checkpoint)
    step: int = content["global_step"]
    epochs: int = content.get(SFTDataModule.__name__, content)["epoch"]  # the data's count is the one that is gone by
    if step >= outcome.step:
        return
    for name, reached in (("max_steps", step), ("max_epochs", epochs)):
        end = trainer[name]
        if end is not None and 0 <= end <= reached:
            raise ValueError(
                f"the run in {folder} finished at step {outcome.step}, {checkpoint} is of step {step}, and "
                f"trainer.{name} {end} leaves nothing to train: `lit-lora export {checkpoint} FOLDER` writes its "
                "adapter"
            )


def _is_first_process() -> bool:
    """Whether this is the process that chooses for all, told by what launchers set: there is no group to ask yet."""
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"  # public, set outside of the function


def _leave_out_noise() -> None:
    """Lightning's advertisements, and two remarks that it makes about itself, say nothing about the run."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(("💡", "`weights_only`")))
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
