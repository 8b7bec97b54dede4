"""``lit-lora fit --help``: what people set first, and the rest by part.

Lightning's Trainer and the callbacks have a hundred settings more than a run needs to be told. ``--help`` shows those of
the model, the data and the most used of the Trainer; ``--help.trainer`` (or any other part) shows a part whole, and
``--help.all`` everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from lit_lora.cli.setting_check import nested_settings

ALL = "all"

_TRAINER = (
    "max_steps", "max_epochs", "accelerator", "devices", "strategy", "precision", "accumulate_grad_batches",
    "gradient_clip_val", "val_check_interval", "default_root_dir",
)  # fmt: skip

_SECTIONS = (
    ("model", "What is fine-tuned", "model."),
    ("adapters", "Which layers get adapters (model.lora)", "model.lora."),
    ("quantization", "How the base is held (model.quantization)", "model.quantization."),
    ("optimization", "What is learned (model.optimization)", "model.optimization."),
    ("step", "At what cost (model.step)", "model.step."),
    ("data", "Data", "data."),
    ("trainer", "Trainer, the most used settings", "trainer."),
)


def asked_part(arguments: Sequence[str]) -> str | None:
    """The part of the help that a command line asks for: "" for what comes first; None for no help."""
    for argument in arguments:
        if argument in ("-h", "--help"):
            return ""
        if argument.startswith("--help."):
            return argument.removeprefix("--help.")
    return None


def help_text(parser: ArgumentParser, verb: str, part: str) -> str:
    """The help of a verb.

    Args:
        parser: of the verb.
        verb: its name.
        part: "" for what people set first, "all", or a part of the config.

    Raises:
        ValueError: for a part that is not there.
    """
    actions = _actions(parser)
    parts = sorted({key.partition(".")[0] for key in actions if "." in key})
    if part not in ("", ALL, *parts):
        raise ValueError(f"no part {part!r}: --help.all shows everything, --help.PART one of {', '.join(parts)}")
    formatter = parser._get_formatter()
    formatter.add_text(f"lit-lora {verb} [--config FILE ...] [--KEY VALUE ...]")
    if part:
        chosen = [action for key, action in actions.items() if part == ALL or key.startswith(f"{part}.")]
        _add(formatter, part if part != ALL else "All settings", chosen)
        return str(formatter.format_help())
    for _, title, prefix in _SECTIONS:
        _add(formatter, title, [action for key, action in actions.items() if _is_first(key, prefix)])
    shown = ", ".join(name for name in parts if name not in ("model", "data"))
    formatter.add_text(f"--help.PART shows the rest: {shown}. --help.all shows everything.")
    formatter.add_text("Each option is a key of YAML, too: see --config and --print_config. docs/command_line.md")
    return str(formatter.format_help())


def _actions(parser: ArgumentParser) -> dict[str, Any]:
    """By key, with the fields of settings that can also be left out altogether (null)."""
    found = {
        action.dest: action
        for action in parser._actions
        if action.dest and not action.dest.endswith((".help", "help")) and type(action).__name__ != "_ActionConfigLoad"
    }
    for key, kind in nested_settings(parser).items():
        if key in found:
            fields = ArgumentParser(exit_on_error=False)
            fields.add_class_arguments(kind, key)
            found |= {action.dest: action for action in fields._actions if action.dest.startswith(f"{key}.")}
    return found


def _is_first(key: str, prefix: str) -> bool:
    if prefix == "trainer.":
        return key in {f"trainer.{name}" for name in _TRAINER}
    rest = key.removeprefix(prefix)
    return key.startswith(prefix) and "." not in rest


def _add(formatter: Any, title: str, actions: Iterable[Any]) -> None:
    formatter.start_section(title)
    formatter.add_arguments(list(actions))
    formatter.end_section()
