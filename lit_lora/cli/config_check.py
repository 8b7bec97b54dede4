"""All that is wrong with a command line and its config files, in one report.

What :mod:`lit_lora.cli.setting_check` finds by the parser's types, and here what takes more: files that are not there,
and values of the right type that the class which they are for refuses. Nothing of this costs a run without mistakes
anything, but for :func:`problems_of`, which looks before the long work starts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lit_lora.base.architectures import check_architecture
from lit_lora.base.load import BYTE_TOKENIZER, RANDOM, resolve_base, resolve_tokenizer
from lit_lora.cli.command_line import settings
from lit_lora.cli.parse_errors import reason
from lit_lora.cli.setting_check import known_settings, look_at_each, misplaced, nested_settings, wrong_type
from lit_lora.config import LoRAConfig
from lit_lora.data.rows.data_source import DataSource
from lit_lora.data.rows.sources import check_source
from lit_lora.files import strict_yaml
from lit_lora.files.shipped import shipped

DATA_KEYS = ("data.train", "data.validation", "data.test", "forgetting.data")
_NAMES_OF_FILES = (*DATA_KEYS, "model.base", "data.tokenizer")


def problems_in(parser: ArgumentParser, arguments: Sequence[str], parts: Mapping[str, Callable[..., Any]]) -> list[str]:
    """What is wrong, a line each, in the order in which it was given; then values that a class refuses.

    Args:
        parser: of the verb, or the one above it.
        arguments: the verb and what follows it, in order.
        parts: the classes that the settings are for, by the key of their group; building one does nothing but check.
    """
    verb, *rest = arguments
    parser = parser_of(parser, verb)
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        found = look_at_each(parser, rest, verb, _wrong_value)
    finally:
        parser.exit_on_error = exits
    return list(dict.fromkeys(found.problems + _refused_parts(found.sound, parts, nested_settings(parser))))


def problems_of(
    config: Namespace, parser: ArgumentParser, arguments: Sequence[str], parts: Mapping[str, Callable[..., Any]]
) -> list[str]:
    """What the parser lets pass: files that are not there, fields of mappings, values that a class refuses, and some
    settings that do not exist (one with an empty value, for example).

    Args:
        config: of the verb, as parsed.
        parser: see :func:`problems_in`, like what follows.
        arguments: the verb and what follows it, in order.
        parts: what checks the values.
    """
    verb, *rest = arguments
    parser = parser_of(parser, verb)
    known = known_settings(parser)
    found: list[str] = []
    unsound: set[str] = set()
    for setting in settings(rest, known, found):
        if problem := misplaced(setting, parser, verb):
            found.append(problem)
        elif problem := wrong_type(parser, setting.key, setting.value):
            found.append(f"{setting.origin}: {setting.key}: {problem}")
            unsound.add(setting.key)
    keys = ("seed_everything", *_NAMES_OF_FILES)
    found += [f"{key}: {problem}" for key in keys if (problem := _wrong_value(key, config.get(key)))]
    return list(dict.fromkeys(found + _refused_parts(config, parts, nested_settings(parser), unsound)))


def parser_of(parser: ArgumentParser, verb: str) -> ArgumentParser:
    """The verb's own parser."""
    verbs = [action.choices for action in parser._actions if action.dest == "subcommand"]
    return verbs[0][verb] if verbs else parser  # type: ignore[index]


def with_shipped(value: Any) -> Any:
    """Data as a setting gives it, where what comes with the package is named by its path."""
    if isinstance(value, list):
        return [with_shipped(source) for source in value]
    if isinstance(value, str):
        return shipped(value) or value
    value.path = shipped(value.path) or value.path
    return value


def _wrong_source(value: Any) -> str | None:
    """What is wrong with data as a setting gives it: a name, or several sources."""
    if isinstance(value, str) and value.lstrip().startswith("[") and not Path(value).exists():
        return _wrong_list(value)  # the parser has taken it for a name, since it is no list of sources
    for source in value if isinstance(value, list) else [value]:
        path = source if isinstance(source, str) else source.get("path")
        if not isinstance(path, str) or not path.strip():
            return f"expected a name or path, got {path!r}"
        try:
            if shipped(path) is None:
                check_source(path)
        except (OSError, ValueError) as error:
            return str(error)
    return None


def _wrong_list(value: str) -> str:
    parser = ArgumentParser(exit_on_error=False, parser_mode=strict_yaml.install())
    parser.add_argument("--sources", type=list[DataSource])
    try:
        sources = strict_yaml.parse(value)
        parser.parse_object({"sources": [{"path": one} if isinstance(one, str) else one for one in sources]})
    except (ArgumentError, TypeError, ValueError, strict_yaml.YAMLError) as error:
        return f"expected a name, or a list of sources: {reason(str(error))}, got {value}"
    return f"expected a name, or a list of sources, got {value}"


def _wrong_value(key: str, value: Any) -> str | None:
    """What is wrong with a value of the right type, looked at by itself."""
    if key == "seed_everything" and not 0 <= int(value or 0) < 2**32:  # Lightning does not say what it is about
        # jsonargparse reads 1:30 as 90, and so a few thousand characters as a number that Python does not print.
        return f"must be from 0 to {2**32 - 1}, got {value if abs(value) < 2**64 else 'a number beyond 2**64'}"
    if key in DATA_KEYS and value is not None:
        return _wrong_source(value)
    if key not in _NAMES_OF_FILES or not isinstance(value, str):
        return None
    if not value.strip():
        return f"expected a name or path, got {value!r}"
    try:
        if value.startswith(RANDOM):
            check_architecture(value.removeprefix(RANDOM))
        elif key == "model.base":
            resolve_base(value)
        elif value != BYTE_TOKENIZER:
            resolve_tokenizer(value)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _refused_parts(
    config: Namespace,
    parts: Mapping[str, Callable[..., Any]],
    nested: Mapping[str, type],
    unsound: Collection[str] = (),
) -> list[str]:
    found: list[str] = []
    built: dict[str, Any] = {}
    nested = {key: kind for key, kind in nested.items() if key not in parts}
    for group, kind in {**nested, **parts}.items():
        given = config.get(group)
        given = given.as_dict() if isinstance(given, Namespace) else given
        if not isinstance(given, Mapping):
            continue
        given = given.get("init_args", given)
        names = {entry.name for entry in fields(kind)} if group in nested else set(given)  # type: ignore[arg-type]
        sound = {n: v for n, v in given.items() if n in names and f"{group}.{n}" not in {*nested, *unsound}}
        sound |= {n: built[f"{group}.{n}"] for n in given if f"{group}.{n}" in built}
        refusals = _refusals(group, cast("Callable[..., Any]", kind), sound)
        if group in nested and not refusals:
            built[group] = cast("Callable[..., Any]", kind)(**sound)
        found += refusals
    return found


def _refusals(group: str, kind: Callable[..., Any], arguments: Mapping[str, Any]) -> list[str]:
    """All that a class has against these arguments: each that it refuses is left out, and it is asked again."""
    parameters = inspect.signature(kind).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    arguments = {**dict.fromkeys(required, ""), **arguments}  # the parser says which ones are missing
    found: list[str] = []
    while refusal := _refusal(kind, arguments):
        for name in sorted(arguments, key=lambda name: name not in refusal):  # the one it speaks of first
            rest = {other: value for other, value in arguments.items() if other != name}
            if name not in required and _refusal(kind, rest) != refusal:
                break
        else:
            return [*found, f"{group}: {refusal}"]
        found.append(f"{group}.{name}: {refusal}")
        arguments = rest
    return found


def _refusal(kind: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    try:
        made = kind(**arguments)
        if isinstance(made, LoRAConfig):  # the module's constructor asks this, which is not given the config here
            made.check_for_training()
    except ValueError as error:
        return " ".join(str(error).split())
    return None
