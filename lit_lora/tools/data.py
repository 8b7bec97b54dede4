"""``lit-lora data``: what a model will see of some data, before anything is trained."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_lora.cli.command_line import options, with_flag_values
from lit_lora.cli.setting_check import refuse
from lit_lora.cli.short_names import FLAGS, as_for_fit

if TYPE_CHECKING:
    from lit_lora.data.look.report import DataReport

OPTIONS = ("rows", "examples", "json", "html", "help")
"""Beside those of ``fit``."""


def data(arguments: list[str]) -> DataReport | None:
    """Look at data as the ``fit`` with these arguments would, and print what was found.

    Takes what ``lit-lora fit`` takes, and the options of :func:`own_options`. Exits with 1 where no row can be used.
    """
    parser = own_options()
    given = options(with_flag_values(arguments, FLAGS))
    own = [token for option in given if option.key in OPTIONS for token in option.tokens]
    chosen = parser.parse_args([*own, *(option.tokens[0] for option in given if not option.key)])
    fit_arguments = as_for_fit([option for option in given if option.key and option.key not in OPTIONS], OPTIONS)
    if chosen.file is not None:
        fit_arguments.append(f"--data.train={chosen.file}")
    elif not any(option.key in ("config", "data", "data.train") for option in options(fit_arguments)):
        refuse(["missing: FILE (see lit-lora data --help)"])
    for path in (chosen.json, chosen.html):
        if path is not None and Path(path).is_dir():
            refuse([f"{path} is a folder: give the name of a file to write"])

    from lit_lora.cli.lightning_cli import parse_fit
    from lit_lora.cli.progress import Counting
    from lit_lora.data.look.inspection import inspect_data
    from lit_lora.wording import for_command_line

    config = parse_fit(fit_arguments)
    settings = given_data(config.data)
    with for_command_line(), Counting() as progress:
        report = inspect_data(
            settings.pop("train"),
            config.model.base,
            rows=chosen.rows,
            examples=chosen.examples,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            progress=progress,
            **settings,
        )
    _print(report.text(colour=_has_colours()))
    if chosen.json is not None:
        _write(chosen.json, json.dumps(report.to_dict(), ensure_ascii=False, indent=1))
    if chosen.html is not None:
        _write(chosen.html, report.html())
    if report.lengths is None:
        sys.exit(1)
    return report


def given_data(config: Any) -> dict[str, Any]:
    """Settings of the data that are not as they are by default."""
    import inspect

    from lit_lora.cli.lightning_cli import plain
    from lit_lora.data.datamodule import SFTDataModule

    parameters = inspect.signature(SFTDataModule).parameters
    return {name: plain(value) for name, value in config.items() if value != parameters[name].default}


def _has_colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # its reader has seen enough; Python would complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(path: str, text: str) -> None:
    from lit_lora.files.atomic import atomic_text

    atomic_text(path, text)
    print(f"wrote {path}", file=sys.stderr)


def _rows(text: str) -> int | None:
    return None if text == "all" else _number(text, least=1)


def _number(text: str, *, least: int = 0) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number


def own_options() -> argparse.ArgumentParser:
    """Those that ``fit`` does not have."""
    parser = argparse.ArgumentParser(
        prog="lit-lora data",
        usage="lit-lora data FILE --model MODEL [options]",
        allow_abbrev=False,
        description="Show what a model will see of some data: examples with what is trained on, lengths, what "
        "max_length would cut, rows that cannot be used, what is ignored, and settings that suit it. Preference pairs "
        "are shown, too. Of the model only config and tokenizer are loaded.",
        epilog="All other arguments are those of lit-lora fit, and mean the same; settings of the data may leave out "
        "data. before their name: --config FILE, --model BASE, --tokenizer NAME, --format FORMAT, --columns MAPPING, "
        "--max_length TOKENS ...",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="data that fit takes as data.train")
    parser.add_argument("--rows", type=_rows, default=10_000, metavar="N", help="the first N rows (10000), or all")
    parser.add_argument("--examples", type=_number, default=3, metavar="N", help="show N examples (3)")
    parser.add_argument("--json", metavar="FILE", help="also write what was found as JSON")
    parser.add_argument("--html", metavar="FILE", help="also write it as one page for a browser")
    return parser
