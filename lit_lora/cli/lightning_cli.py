"""``lit-lora fit|validate|test|predict``: a LightningCLI with the proving callbacks wired in.

Each callback has a stable key (``--convergence.min_decrease 0.4``), so that a config file only says what differs.
``fit`` writes one run folder, ``trainer.default_root_dir``: the resolved config, checkpoints, metrics, the adapter. A
new run never writes into the folder of an earlier one: it takes the next free name.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks.timer import Interval
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_lora.callbacks.verdict import NotProvedError
from lit_lora.cli.command_line import in_order, with_flag_values, without_contradictions
from lit_lora.cli.config_check import DATA_KEYS, parser_of, problems_in, problems_of, with_shipped
from lit_lora.cli.help import asked_part, settings_of, show_help
from lit_lora.cli.parse_errors import reason
from lit_lora.cli.setting_check import known_settings, refuse
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.files import strict_yaml
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.files.environment import CHECKPOINT_VARIABLE
from lit_lora.module import LoRALightningModule
from lit_lora.report.outcome import Outcome
from lit_lora.runs.config_file import ConfigFile
from lit_lora.runs.fit import CALLBACKS, TRAINER_DEFAULTS, as_shown, concluded, is_over, left_out, wired
from lit_lora.runs.run_folder import RunFolder
from lit_lora.runs.run_record import PredictionWriter, RunRecord
from lit_lora.runs.said import readable
from lit_lora.runs.start import choose_start, one_run
from lit_lora.training.trainer_settings import check_trainer, missing_end
from lit_lora.wording import for_command_line

PARTS: dict[str, Callable[..., Any]] = {
    "trainer": check_trainer,
    "model": LoRALightningModule,
    "data": SFTDataModule,
    **CALLBACKS,
}
"""What checks the values of a config, by key."""

QUIET = "print the verdict only; warnings and errors are shown in any case."
REPORT = "write report.html, a page to look at, into the run folder at the end."
OWN_FLAGS = ("quiet", "report")
"""Options that are no setting of a part of the run, and leave no trace in its config."""


def run(arguments: Sequence[str]) -> None:
    """Parse a command line, verb first, and run it.

    Raises:
        ValueError: also for what Lightning calls a misconfiguration.
        KeyboardInterrupt: where Lightning would exit with 1 for Ctrl-C.
        SIGTERMException: for a termination.
        NotProvedError: for a check that ended the run.
        SystemExit: with a code of its own for a run that failed a check.
    """
    sys.argv = [sys.argv[0], *arguments]  # Lightning starts other ranks with this script
    with one_run():
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


def settings_of_verb(verb: str) -> dict[str, Any]:
    """The settings of a verb, by key, as its parser has them."""
    before = list(sys.argv)
    sys.argv = [sys.argv[0], verb]
    try:
        _run(_ListingCLI)
    except _Parsed as parsed:
        return parsed.config
    finally:
        sys.argv = before
    raise AssertionError("the command line was run")


def replay(config: Path, checkpoint: Path | None, folder: Path, until: int, num_processes: int) -> None:
    """Train as a config says, in this process and another folder, until a step: see ``lit_lora.runs.verification``.

    Args:
        config: of the run.
        checkpoint: to go on from; None for the start of the run.
        folder: to train in; nothing is written elsewhere.
        until: step to stop after, with the schedule of the whole run.
        num_processes: that the run had; as many micro-batches are accumulated here.

    Raises:
        ValueError: for what no run can go on with.
    """
    options: dict[str, Any] = {"report": False, "quiet": True, "ckpt_path": checkpoint}
    options |= {"trainer.default_root_dir": folder, "trainer.logger": None, "checkpoint.dirpath": None}
    options |= {"export.folder": None, "export.best_folder": None}
    if num_processes > 1:
        trainer = strict_yaml.read(config)["trainer"]
        accumulated = num_processes * trainer["accumulate_grad_batches"]
        options |= {"trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
        options |= {"trainer.accumulate_grad_batches": accumulated}
    given = [f"--{name}={'null' if value is None else value}" for name, value in options.items()]
    stopping = type("Replay", (LoRACLI,), {"further_callbacks": [_StopAfter(until)]})
    before = list(sys.argv)
    sys.argv = [sys.argv[0], "fit", "--config", str(config), *given]
    try:
        with one_run(), redirect_stdout(io.StringIO()):
            _run(stopping)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except NotProvedError:
        pass  # a part of a run need not prove what the whole did
    except SystemExit as error:
        raise ValueError("its config is refused, see above") from error
    finally:
        sys.argv = before


class _StopAfter(Callback):
    """Ends a run after a step, as early stopping does."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ask the Trainer to stop."""
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def plain(value: Any) -> Any:
    """Parsed settings as their own classes take them: groups within lists, such as sources of data, as mappings."""
    if isinstance(value, Namespace):
        return value.as_dict()
    return [plain(entry) for entry in value] if isinstance(value, list) else value


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
        trainer_defaults=TRAINER_DEFAULTS,
        parser_kwargs={"prog": "lit-lora"},
    )


class LoRACLI(LightningCLI):
    """The command line of a fine-tuning run."""

    outcome: Outcome | None = None
    """How the run ended; of a fit, on its first process."""
    trains = True
    """Whether a fit is run, which must have an end, and not only parsed."""
    further_callbacks: Sequence[Callback] = ()
    """Of a fit, beside the configured ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Run the command line; see :func:`run`."""
        self.run_folder: RunFolder | None = None
        with ExitStack() as self._said:
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
        """Give every proving callback its key, and the run itself what is no setting of a part of it."""
        parser.add_argument("--quiet", type=bool, default=False, help=QUIET)
        parser.add_argument("--report", type=bool, default=True, help=REPORT)
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        actions: list[Any] = parser._actions
        for action in actions:
            if action.dest in DATA_KEYS:  # a file of data is no file that the sources are written in
                action._enable_path = False

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Put the command line in order, parse it, then check the config as a whole."""
        verb, *rest = sys.argv[1:]
        if (part := asked_part(rest)) is not None:
            show_help(parser_of(parser, verb), verb, part)
        unreadable: list[str] = []
        try:
            rest = in_order(with_flag_values(rest, {f"--{name}" for name in OWN_FLAGS}))
            sys.argv[2:], notices = without_contradictions(rest, known_settings(parser_of(parser, verb)), unreadable)
        except ValueError as error:
            refuse([str(error)])
        if unreadable:
            refuse(problems_in(parser, sys.argv[1:], PARTS))
        quiet = False  # what --print_config shows is explained in any case
        try:
            super().parse_arguments(parser, args)
            quiet = self.config[self.config["subcommand"]].quiet
        finally:
            self._said.enter_context(readable(quiet=quiet))
            for notice in notices:
                rank_zero_info(notice)
        self.check_config(self.config[self.config["subcommand"]], parser)

    def check_config(self, config: Any, parser: LightningArgumentParser) -> None:
        """Find shipped data, and refuse what cannot work.

        Raises:
            SystemExit: after listing all problems.
            ValueError: naming a checkpoint that cannot be read.
        """
        for key in DATA_KEYS:
            if config.get(key):
                config[key] = with_shipped(config[key])
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
        start = choose_start(
            config.trainer.default_root_dir,
            config.get("ckpt_path"),
            {name: config.trainer[name] for name in ("max_steps", "max_epochs")},
            verb=verb,
            dirpath=config.checkpoint.get("dirpath"),
            trial=bool(config.trainer.get("fast_dev_run")),
        )
        self.run_folder = start.claimed
        config.ckpt_path, config.trainer.default_root_dir = start.checkpoint, start.folder

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the record of the run, a logger into its folder, and atomic checkpoints."""
        settings, fits = self._get(self.config_init, "trainer"), self.subcommand == "fit"
        config = self.config[self.subcommand]
        shown = as_shown(vars(settings), [], quiet=config.quiet)
        self.config_file = ConfigFile(self._resolved)
        checkpoint = config.ckpt_path if fits else None
        self.record = RunRecord(
            is_over=is_over(checkpoint, config.trainer.default_root_dir, self.config_file), report=config.report
        )
        extra: list[Callback] = [self.record, self.config_file, *self.further_callbacks] if fits else []
        if self.subcommand == "predict":
            extra.append(PredictionWriter())
        out = left_out(shown) | ({"forgetting"} if config.forgetting.data is None else set())
        for key in out:
            self._parser(self.subcommand).callback_keys.remove(key)
        for name, value in wired(shown, extra, logger=fits).items():
            settings[name] = value
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Validate where training did not end with it, then say what the run proved, and where its results are."""
        self.outcome = concluded(self.trainer, self.model, self.datamodule, self.record, self.config_file)

    def _resolved(self) -> dict[str, Any]:
        """The settings of the run; what it showed is none of them."""
        self._dump_config()
        return {name: value for name, value in self.config_dump.items() if name not in OWN_FLAGS}


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


class _ListingCLI(LoRACLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Parsed(settings_of(parser_of(parser, sys.argv[1])))


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
