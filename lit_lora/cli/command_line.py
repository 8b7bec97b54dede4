"""What a command line says: its settings, where each was given, and which one holds.

jsonargparse applies options from left to right, so that a config file that stands after an option would take it back.
Here a command line is put in order first: config files, in their order, then everything else, and a whole
(``--data my.yaml``) before its parts (``--data.train x``). What is given for one setting can leave no room for another:
then the one from the command line holds, before that of a config file of the user's, before that of a shipped one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lit_lora.files import strict_yaml
from lit_lora.files.shipped import is_shipped, shipped, similar_config

CONFIG = "config"
COMMAND_LINE = "command line"


class Source(IntEnum):
    """Where a setting was given; what is higher holds."""

    SHIPPED_CONFIG = 0
    CONFIG = 1
    COMMAND_LINE = 2


class Option(NamedTuple):
    """One option as it stands on the command line, or a stray word."""

    key: str
    """Name without dashes; empty for a word that belongs to no option."""
    value: str | None
    tokens: tuple[str, ...]

    @property
    def setting(self) -> str:
        """The key of what is set: ``--trainer.callbacks+=X`` appends to ``trainer.callbacks``."""
        return self.key.removesuffix("+")


class Setting(NamedTuple):
    """One value, and where it was given."""

    key: str
    value: Any
    origin: str
    """"command line", or the config file's name."""
    source: Source


class Replacement(NamedTuple):
    """A setting that leaves no room for another."""

    key: str
    other: str
    unset: str
    """The value that takes the other one back."""
    only_shipped: bool = False
    """Take it back only where a shipped config gave it: beside one of the user's, both have their meaning."""


REPLACEMENTS = (
    Replacement("data.validation", "data.validation_fraction", "0.0"),
    Replacement("data.validation_fraction", "data.validation", "null"),
    Replacement("model.optimizer", "model.optimization.weight_decay", "0.0"),
    Replacement("trainer.max_epochs", "trainer.max_steps", "-1", only_shipped=True),
)


def options(arguments: Sequence[str]) -> list[Option]:
    """The options of a command line, without the verb."""
    found: list[Option] = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if token[:2] == "-c":
            token = f"--{CONFIG}" + (f"={token[2:].removeprefix('=')}" if token[2:] else "")
        if not token.startswith("--") or token == "--":
            found.append(Option("help" if token == "-h" else "", None, (token,)))
            continue
        flag, given, value = token.partition("=")
        tokens: tuple[str, ...] = (token,)
        if not given and flag != "--print_config" and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            tokens = (token, value)
        has_value = bool(given) or len(tokens) == 2
        found.append(Option(flag.removeprefix("--"), value if has_value else None, tokens))
    return found


def in_order(arguments: Sequence[str]) -> list[str]:
    """The same command line with its config files first, found where they lie, and each whole before its parts.

    Doing it again changes nothing: other ranks of a run are started with what comes out.
    """
    configs: list[Option] = []
    others: list[Option] = []
    for option in options(arguments):
        if option.key == CONFIG:
            configs.append(option if option.value is None else _found(option.value))
            continue
        parts = [n for n, other in enumerate(others) if option.key and other.setting.startswith(f"{option.key}.")]
        others.insert(parts[0] if parts else len(others), option)
    return [token for option in [*configs, *others] for token in option.tokens]


def with_flag_values(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """``--compare`` alone means ``--compare true``."""
    values = ("true", "false", "yes", "no")
    return [f"{a}=true" if a in flags and b not in values else a for a, b in itertools.pairwise([*arguments, ""])]


def without_contradictions(
    arguments: Sequence[str], known: set[str], problems: list[str]
) -> tuple[list[str], list[str]]:
    """Take back what an explicit setting leaves no room for, see :data:`REPLACEMENTS`.

    Args:
        arguments: in order.
        known: keys of all settings.
        problems: see :func:`settings`.

    Returns:
        The arguments, and a line for each setting that was taken back.
    """
    given: dict[str, Setting] = {}
    for setting in settings(arguments, known, problems):
        if setting.key not in given or setting.source >= given[setting.key].source:
            given[setting.key] = setting
    taken_back, notices = [], []
    for key, other, unset, only_shipped in REPLACEMENTS:
        if key not in given or other not in given:
            continue
        holds, gives_way = given[key], given[other]
        if not holds.value or gives_way.source >= holds.source or gives_way.value == strict_yaml.parse(unset):
            continue
        if only_shipped and gives_way.source is not Source.SHIPPED_CONFIG:
            continue
        taken_back.append(f"--{other}={unset}")
        notices.append(
            f"{key} of the {holds.origin} replaces {other} {_shown(gives_way.value)} of {gives_way.origin}"
            if holds.source is Source.COMMAND_LINE
            else f"{key} of {holds.origin} replaces {other} {_shown(gives_way.value)} of {gives_way.origin}"
        )
    given_options = options(arguments)
    configs = [token for option in given_options if option.key == CONFIG for token in option.tokens]
    others = [token for option in given_options if option.key != CONFIG for token in option.tokens]
    return [*configs, *taken_back, *others], notices


def settings(arguments: Sequence[str], known: set[str], problems: list[str]) -> Iterator[Setting]:
    """Every setting of a command line and its config files, in the order in which they are applied.

    Args:
        arguments: in order.
        known: keys of all settings.
        problems: takes what is wrong with files and values as such.
    """
    for option in options(arguments):
        if option.key == CONFIG and not option.value:
            problems.append(f"--{CONFIG}: expected a file after it")
        elif option.key == CONFIG:
            yield from _of_config(str(option.value), known, problems)
        elif option.key and not option.key.endswith(("help", "print_config")):
            try:
                value = _value(option)
            except ValueError as error:
                problems.append(f"{COMMAND_LINE}: {option.setting}: {error}")
                continue
            is_group = any(k.startswith(f"{option.key}.") for k in known)
            if is_group and isinstance(value, str) and Path(value).is_file():
                yield from _of_config(value, known, problems, f"{option.key}.")
            elif is_group and isinstance(value, Mapping):
                yield from _leaves(value, f"{option.key}.", known, COMMAND_LINE, Source.COMMAND_LINE)
            else:
                yield Setting(option.key, value, COMMAND_LINE, Source.COMMAND_LINE)


def _value(option: Option) -> Any:
    if option.value is None:
        raise ValueError("expected a value after it")
    if not option.value.strip():
        return option.value
    try:
        return strict_yaml.parse(option.value)
    except strict_yaml.StrictError as error:
        raise ValueError(strict_yaml.reason(error)) from error
    except yaml.YAMLError:
        return option.value  # text: a regular expression, a prompt


def _of_config(name: str, known: set[str], problems: list[str], prefix: str = "") -> Iterator[Setting]:
    path = Path(name)
    inline = name.lstrip().startswith("{")
    origin = COMMAND_LINE if inline else name
    try:
        content = strict_yaml.parse(name) if inline else strict_yaml.read(path)
    except FileNotFoundError:
        hint = f": {similar_config(name)}" if path.suffix in (".yaml", ".yml") else ""
        problems.append(f"no config file {name}{hint}")
    except IsADirectoryError:
        problems.append(f"--config {name} is a folder: give a file in it")
    except OSError as error:
        problems.append(f"config file {name} cannot be read: {error.strerror or error}")
    except ValueError as error:
        problems.append(str(error))
    except yaml.YAMLError as error:
        problems.append(f"--config is not valid YAML: {strict_yaml.reason(error)}")
    else:
        if isinstance(content, Mapping):
            source = Source.SHIPPED_CONFIG if not inline and is_shipped(name) else Source.CONFIG
            yield from _leaves(content, prefix, known, _short(origin, source), source)
        elif content is not None:
            problems.append(f"{origin}: expected settings by name, got {_shown(content)}")


def _leaves(content: Mapping[Any, Any], prefix: str, known: set[str], origin: str, source: Source) -> Iterator[Setting]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_group = any(k.startswith(f"{key}.") for k in known)
        if is_group and isinstance(value, Mapping):
            fields = value.get("init_args") or {} if "class_path" in value else value  # as a run's config.yaml has it
            yield from _leaves(fields, f"{key}.", known, origin, source)
        else:
            yield Setting(key, value, origin, source)


def _found(name: str) -> Option:
    """A config under the path where it lies; one that can be read only once (a pipe) by its content."""
    path = Path(name)
    if path.exists() and not path.is_file() and not path.is_dir():
        try:
            name = json.dumps(strict_yaml.read(path))
        except ValueError as error:
            raise ValueError(f"--config {error}") from error
    elif path.suffix in (".yaml", ".yml"):
        name = shipped(name) or name
    return Option(CONFIG, name, (f"--{CONFIG}={name}",))


def _short(origin: str, source: Source) -> str:
    return Path(origin).name if source is Source.SHIPPED_CONFIG else origin


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
