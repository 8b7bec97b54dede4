"""All that is wrong with a command line and its config files, in one report.

The parser stops at the first mistake. After it has, every setting is looked at by itself: unknown keys with what was
probably meant, values of the wrong type, files that are not there. What has the right type is given to the class that
it is for, which checks its values. Nothing of this costs a run without mistakes anything, but for :func:`problems_of`,
which looks before the long work starts.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lit_lora.config import LoRAConfig, QuantizationConfig
from lit_lora.data.sources import existing_file, is_file_source
from lit_lora.models import BYTE_TOKENIZER, RANDOM, check_architecture, resolve_base, resolve_tokenizer

_GROUPS = ("trainer", "model", "data")
_MAX_VALUE = 80
_BUILT_FROM_DICTS: dict[str, Any] = {"model.lora": LoRAConfig, "model.quantization": QuantizationConfig}


class Setting(NamedTuple):
    """One value, and where it was given."""

    key: str
    value: Any
    origin: str


def problems_in(parser: ArgumentParser, arguments: Sequence[str], parts: Mapping[str, Callable[..., Any]]) -> list[str]:
    """What is wrong, a line each, in the order in which it was given; then values that a class refuses.

    Args:
        parser: of the verb, or the one above it.
        arguments: the verb and what follows it.
        parts: the classes that the settings are for, by the key of their group; building one does nothing but check.
    """
    parser = _of_verb(parser, arguments)
    found: list[str] = []
    known = _known(parser)
    given, sound = set(), Namespace()
    for setting in _settings(arguments[1:], known, found):
        given.add(setting.key)
        if problem := _misplaced(setting, known):
            found.append(problem)
            continue
        value, problems = _checked(parser, setting)
        found += [f"{setting.origin}: {problem}" for problem in problems]
        if not problems:
            sound[setting.key] = value
    required = [action.dest for action in parser._actions if action.required]
    found += [f"{key} is required" for key in required if not given.intersection([key, *_parents(key)])]
    return list(dict.fromkeys(found + _refused_parts(sound, parts)))


def problems_of(
    config: Namespace, parser: ArgumentParser, arguments: Sequence[str], parts: Mapping[str, Callable[..., Any]]
) -> list[str]:
    """What the parser lets pass: files that are not there, fields of mappings, values that a class refuses, and some
    settings that do not exist (one with an empty value, for example).

    Args:
        config: of the verb, as parsed.
        parser: see :func:`problems_in`, like what follows.
        arguments: the verb and what follows it.
        parts: what checks the values.
    """
    known = _known(_of_verb(parser, arguments))
    misplaced = [_misplaced(setting, known) for setting in _settings(arguments[1:], known, [])]
    keys = ("data.train", "data.validation", "data.test", "model.base", "data.tokenizer")
    found = list(filter(None, misplaced))
    found += [f"{key}: {problem}" for key in keys if (problem := _missing_file(key, config.get(key)))]
    found += _wrong_seed("seed_everything", config.get("seed_everything"))
    for key in _BUILT_FROM_DICTS:
        found += _wrong_fields(key, config.get(key))
    return found + _refused_parts(config, parts)


def suggestion(key: str, known: set[str]) -> str:
    """The known setting that was probably meant: one beside it, or one of that name elsewhere."""
    group, _, name = key.rpartition(".")
    beside = {k.removeprefix(f"{group}."): k for k in known if k.rpartition(".")[0] == group}
    close = difflib.get_close_matches(name, beside, n=1, cutoff=0.6)
    if close:
        return f", did you mean {beside[close[0]]!r}?"
    elsewhere = sorted(k for k in known if k.rpartition(".")[2] == name)
    if elsewhere:
        return f", did you mean {elsewhere[0]!r}?"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    if close:
        return f", did you mean {close[0]!r}?"
    return f"; {group} has {', '.join(sorted(beside))}" if 0 < len(beside) < 15 else ""


def _of_verb(parser: ArgumentParser, arguments: Sequence[str]) -> ArgumentParser:
    verbs = [action.choices for action in parser._actions if action.dest == "subcommand"]
    return verbs[0][arguments[0]] if verbs else parser  # type: ignore[index]


def _known(parser: ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions if action.dest and not action.dest.endswith("help")}


def _misplaced(setting: Setting, known: set[str]) -> str | None:
    if setting.key in _GROUPS:
        return f"{setting.origin}: {setting.key}: expected settings by name, got {_shown(setting.value)}"
    if setting.key not in known:
        return f"{setting.origin}: no setting {setting.key!r}{suggestion(setting.key, known)}"
    return None


def _settings(arguments: Sequence[str], known: set[str], found: list[str]) -> Iterator[Setting]:
    rest = list(arguments)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            continue
        if not given:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if flag in ("--config", "--c"):
            yield from _file_settings(value, known, found)
            continue
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
        key = flag.removeprefix("--")
        inside = next((k for k in _parents(key) if k in known and k not in _GROUPS), None)
        if key not in known and inside is not None:  # --model.lora.r 4 is part of the value of model.lora
            field = key.removeprefix(f"{inside}.")
            if inside in _BUILT_FROM_DICTS and "." not in field and field not in ("class_path", "init_args"):
                yield Setting(inside, {field: value}, "command line")
            continue
        yield Setting(key, value, "command line")


def _file_settings(name: str, known: set[str], found: list[str]) -> Iterator[Setting]:
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.append(f"no config file {name}")
    except (OSError, UnicodeDecodeError) as error:
        found.append(f"{name} cannot be read: {error}")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        found.append(f"{name} is not valid YAML: {' '.join(str(error).split())}")
    else:
        if content is None:
            return
        if not isinstance(content, Mapping):
            found.append(f"{name}: expected settings by name, got {type(content).__name__}")
            return
        yield from _leaves(content, "", known, name)


def _leaves(content: Mapping[Any, Any], prefix: str, known: set[str], origin: str) -> Iterator[Setting]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_group = any(k.startswith(f"{key}.") for k in known)
        if is_group and isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.", known, origin)
        elif is_group and key not in known:
            yield Setting(key, value, origin)
        else:
            yield Setting(key.removesuffix("+"), value, origin)


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _checked(parser: ArgumentParser, setting: Setting) -> tuple[Any, list[str]]:
    """The value as the parser understands it, and what is wrong with it by itself."""
    key, value = setting.key, setting.value
    if key in _BUILT_FROM_DICTS:
        problems = _wrong_fields(key, value)
        if problems or isinstance(value, Mapping):
            return value, problems
    try:
        parsed = _parsed(parser, setting)
    except (ArgumentError, ValueError, TypeError, KeyError, AttributeError) as error:
        return None, [f"{key}: {_reason(error)}, got {_shown(value)}"]
    if problem := _missing_file(key, value):
        return None, [f"{key}: {problem}"]
    return parsed, _wrong_seed(key, parsed)


def _wrong_seed(key: str, value: Any) -> list[str]:
    """Lightning sets it before anything else is built, and does not say what it is about."""
    if key == "seed_everything" and not 0 <= int(value or 0) < 2**32:
        return [f"{key} must be from 0 to {2**32 - 1}, got {value}"]
    return []


def _parsed(parser: ArgumentParser, setting: Setting) -> Any:
    """The value as the parser understands it, or one of the parser's errors."""
    base = parser.get_defaults(skip_validation=True)
    nested: Any = setting.value
    for part in reversed(setting.key.split(".")):
        nested = {part: nested}
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            if base.get("data") is not None and base.get("data.train") is None and setting.key != "data.train":
                base["data.train"] = "train.jsonl"
            return parser.parse_object(nested, base).get(setting.key)  # by place: the name differs between versions
    finally:
        parser.exit_on_error = exits


def _refused_parts(config: Namespace, parts: Mapping[str, Callable[..., Any]]) -> list[str]:
    found: list[str] = []
    for group, kind in parts.items():
        given = config.get(group)
        if isinstance(given, Namespace):
            arguments = {
                name: value for name, value in vars(given).items() if f"{group}.{name}" not in _BUILT_FROM_DICTS
            }
            found += _refusals(group, kind, arguments)
    return found


def _refusals(group: str, kind: Callable[..., Any], arguments: Mapping[str, Any]) -> list[str]:
    """All that a class has against these arguments: each that it refuses is left out, and it is asked again."""
    parameters = inspect.signature(kind).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    arguments = {**dict.fromkeys(required, ""), **arguments}  # the parser says which ones are missing
    found: list[str] = []
    while refusal := _refusal(kind, arguments):
        for name in arguments:
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
        kind(**arguments)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _wrong_fields(key: str, value: Any) -> list[str]:
    """A plain mapping passes as one for the parser; what it is to become says more."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if not isinstance(value, Mapping) or "class_path" in value:
        return []
    kind = _BUILT_FROM_DICTS[key]
    known = {entry.name for entry in fields(kind)}
    found = [f"no setting {f'{key}.{name}'!r}{suggestion(str(name), known)}" for name in value if name not in known]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    sound = {}
    for name in filter(known.__contains__, value):
        try:
            parser.parse_object({name: value[name]})
        except (ArgumentError, ValueError, TypeError) as error:
            found.append(f"{key}.{name}: {_reason(error)}, got {_shown(value[name])}")
        else:
            sound[name] = value[name]
    return found + _refusals(key, kind, sound)


def _reason(error: Exception) -> str:
    """The last lines of the parser's report say what was expected."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    expected = [line.split(". Got value")[0] for line in lines if line.lower().startswith(("- expected", "expected"))]
    text = " or ".join(dict.fromkeys(line.removeprefix("- ") for line in expected)) or " ".join(lines[-2:])
    return text.rstrip(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _missing_file(key: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        if key in ("data.train", "data.validation", "data.test") and is_file_source(value):
            existing_file(value)
        elif key in ("model.base", "data.tokenizer") and value.startswith(RANDOM):
            check_architecture(value.removeprefix(RANDOM))
        elif key == "model.base":
            resolve_base(value)
        elif key == "data.tokenizer" and value != BYTE_TOKENIZER:
            resolve_tokenizer(value)
    except (OSError, ValueError) as error:
        return str(error)
    return None
