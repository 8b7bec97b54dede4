"""``lit-lora fit --help``: what people set first, and the rest by part.

Lightning's Trainer and the callbacks have a hundred settings more than a run needs to be told. ``--help`` shows those
of the model, the data and the most used of the Trainer; ``--help.trainer`` (or any other part) shows a part whole, and
``--help.all`` everything.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from lit_lora.cli.setting_check import nested_settings, refuse

ALL = "all"

_TRAINER = (
    "max_steps", "max_epochs", "accelerator", "devices", "strategy", "precision", "accumulate_grad_batches",
    "gradient_clip_val", "val_check_interval", "default_root_dir",
)  # fmt: skip

_SECTIONS = (
    ("What is fine-tuned", "model."),
    ("Which layers get adapters (model.lora)", "model.lora."),
    ("How the base is quantized (model.quantization), if one of these is given", "model.quantization."),
    ("What is learned (model.optimization)", "model.optimization."),
    ("At what cost (model.step)", "model.step."),
    ("Data", "data."),
    ("Trainer, the most used settings", "trainer."),
    ("Output", "quiet"),
    ("Output", "report"),
)


def asked_part(arguments: Sequence[str]) -> str | None:
    """The part of the help that a command line asks for: "" for what comes first; None for no help."""
    for argument in arguments:
        if argument in ("-h", "--help"):
            return ""
        if argument.startswith("--help."):
            return argument.removeprefix("--help.")
    return None


def show_help(parser: ArgumentParser, verb: str, part: str) -> NoReturn:
    """Print the help of a verb, and exit.

    Raises:
        SystemExit: always; with 2 for a part that is not there.
    """
    try:
        print(help_text(parser, verb, part))
    except ValueError as error:
        refuse([str(error)])
    raise SystemExit(0)


def help_text(parser: ArgumentParser, verb: str, part: str) -> str:
    """The help of a verb.

    Args:
        parser: of the verb.
        verb: its name.
        part: "" for what people set first, "all", or a part of the config.

    Raises:
        ValueError: for a part that is not there.
    """
    actions = settings_of(parser)
    parts = sorted({key.partition(".")[0] for key in actions if "." in key})
    if part not in ("", ALL, *parts):
        raise ValueError(f"no part {part!r}: --help.all shows everything, --help.PART one of {', '.join(parts)}")
    lines = [f"usage: lit-lora {verb} [--config FILE ...] [--KEY VALUE ...]"]
    if part:
        chosen = [action for key, action in actions.items() if part == ALL or key.startswith(f"{part}.")]
        return "\n".join(lines + _section(part if part != ALL else "All settings", chosen))
    for title, prefix in _SECTIONS:
        lines += _section(title, [action for key, action in actions.items() if _is_first(key, prefix)])
    shown = ", ".join(name for name in parts if name not in ("model", "data"))
    lines += ["", *_wrapped(f"--help.PART shows the rest: {shown}. --help.all shows everything.", "")]
    lines += _wrapped("Each option is a key of YAML, too; --print_config shows all as they would hold.", "")
    return "\n".join(lines)


def settings_of(parser: ArgumentParser) -> dict[str, Any]:
    """By key, with the fields of settings that can also be left out altogether (null)."""
    found = {
        action.dest: action
        for action in parser._actions
        if action.dest and not action.dest.endswith((".help", "help")) and type(action).__name__ != "_ActionConfigLoad"
    }
    for key, kind in nested_settings(parser).items():
        if found.pop(key, None) is not None:
            fields = ArgumentParser(exit_on_error=False)
            fields.add_class_arguments(kind, key)
            found |= {action.dest: action for action in fields._actions if action.dest.startswith(f"{key}.")}
    return found


def _is_first(key: str, prefix: str) -> bool:
    if prefix == "trainer.":
        return key in {f"trainer.{name}" for name in _TRAINER}
    rest = key.removeprefix(prefix)
    return key.startswith(prefix) and "." not in rest


def _section(title: str, actions: Iterable[Any]) -> list[str]:
    lines = ["", f"{title}:"]
    for action in actions:
        name = max((option for option in action.option_strings if not option.endswith("+")), key=len)
        lines.append(f"  {name}  {value_words(action)}".rstrip())
        lines += _wrapped(explanation(action), "        ")
    return lines


def explanation(action: Any) -> str:
    """What a setting does, as its docstring says it."""
    return " ".join((action.help or "").replace("``", "").replace("%%", "%").split())


def value_words(action: Any) -> str:
    """What a setting takes, and what it is where nothing is said."""
    typehint = getattr(action, "_typehint", None)
    words = " or ".join(dict.fromkeys(_words(typehint))) if typehint is not None else ""
    default = action.default
    if default is argparse.SUPPRESS or is_dataclass(default):
        return words
    given = json.dumps(default) if isinstance(default, (bool, type(None), dict, list)) else str(default)
    return f"{words} ({given})" if words else f"({given})"


def value_choices(typehint: Any) -> list[str]:
    """The values of a type that names them one by one; of a union, all that are named in it."""
    if typehint is bool:
        return ["true", "false"]
    if get_origin(typehint) is Literal:
        return [json.dumps(value) if isinstance(value, bool) else str(value) for value in get_args(typehint)]
    if get_origin(typehint) in (Union, UnionType):
        return list(dict.fromkeys(value for part in get_args(typehint) for value in value_choices(part)))
    return []


def _words(typehint: Any) -> Iterable[str]:
    if get_origin(typehint) is Literal:
        yield "|".join(map(str, get_args(typehint)))
    elif get_origin(typehint) in (Union, UnionType):
        for part in get_args(typehint):
            if part is not NoneType:
                yield from _words(part)
    elif typehint in _PLAIN:
        yield _PLAIN[typehint]
    else:
        name = getattr(get_origin(typehint) or typehint, "__name__", str(typehint))
        yield {"list": "[LIST]", "dict": "{MAPPING}"}.get(name, "CLASS")


_PLAIN = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "true|false", Any: "VALUE"}


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
