"""What is wrong with a command line and its config files as the parser sees it: unknown settings, wrong types.

The parser stops at the first mistake. After it has, every setting is looked at by itself, and all that is wrong goes
into one report. Light: the verbs that need no torch until they work use it too.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from lit_lora.cli.command_line import COMMAND_LINE, CONFIG, Option, Setting, Source, options, settings
from lit_lora.cli.parse_errors import reason, subclasses
from lit_lora.cli.synonyms import suggestion
from lit_lora.files import strict_yaml

GROUPS = ("trainer", "model", "data")
_ERRORS = (ArgumentError, ValueError, TypeError, KeyError, AttributeError)
_MAX_VALUE = 80
_MAX_PROBLEMS, _MAX_LINE = 40, 2000
"""Of what is wrong; nobody reads more."""


class Findings:
    """What is wrong, a line each, in the order in which it was given; and what is not."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.sound = Namespace()
        """Values without fault, for checks that look at several of them."""


def look_at_each(
    parser: ArgumentParser,
    arguments: Sequence[str],
    verb: str,
    wrong: Callable[[str, Any], str | None] = lambda key, value: None,
) -> Findings:
    """Look at every setting by itself.

    Args:
        parser: of the verb.
        arguments: what follows the verb, in order.
        verb: its name.
        wrong: what is wrong with a value of the right type, by key.
    """
    found = Findings()
    known = known_settings(parser)
    given: set[str] = set()
    unreadable: list[str] = []
    in_configs: dict[str, Any] = {}
    for setting in settings(arguments, known, unreadable):
        if setting.source is not Source.COMMAND_LINE:
            in_configs[setting.key.removesuffix("+")] = setting.value
        given.add(setting.key.removesuffix("+"))
        if problem := misplaced(setting, parser, verb):
            found.problems.append(problem)
        elif not (setting.source is Source.COMMAND_LINE and _class_setting(setting.key, known, parser)):
            value, problem = _checked(parser, setting, wrong)
            if problem is None:
                found.sound[setting.key] = value
            else:
                found.problems.append(f"{setting.origin}: {setting.key}: {problem}")
    found.problems[:0] = unreadable
    for key, tokens in _class_options(parser, options(arguments), known).items():
        if any(line.startswith(f"{COMMAND_LINE}: {key}:") for line in found.problems):
            continue
        is_given = any(option.setting == key for option in options(tokens))
        if in_configs.get(key) and not is_given:  # a class from a file, and here only arguments for it
            tokens, is_given = [f"--{key}={json.dumps(in_configs[key])}", *tokens], True
        if not is_given:
            found.problems.append(f"{COMMAND_LINE}: {options(tokens)[0].key} is for a class: --{key} CLASS comes first")
        elif problem := _refused(partial(_accepted, parser, tokens)):
            found.problems.append(f"{COMMAND_LINE}: {_told(parser, key, problem, tokens)}")
    num_places = sum(not action.option_strings for action in parser._actions)
    stray = [option.tokens[0] for option in options(arguments) if not option.key][num_places:]
    found.problems += [f"{COMMAND_LINE}: {word!r} follows no --option: each takes one value" for word in stray]
    required = [action.dest for action in _required(parser) if action.option_strings]
    if not unreadable:  # what is missing may stand there
        found.problems += [f"{key} is required" for key in required if not given & {key, *_parents(key)}]
    found.problems = list(dict.fromkeys(found.problems))
    return found


def nested_settings(parser: ArgumentParser) -> dict[str, Any]:
    """Settings that are a mapping in YAML, and the dataclass that is made of it: its fields are settings, too."""
    kinds = {
        action.dest: [getattr(action, "basetype", None), *_alternatives(getattr(action, "_typehint", None))]
        for action in parser._actions
    }
    return {key: kind for key, several in kinds.items() for kind in several if is_dataclass(kind)}


def _alternatives(typehint: Any) -> list[Any]:
    """The types that a value can have itself, and not as an element of a list."""
    return [*get_args(typehint)] if get_origin(typehint) in (Union, UnionType) else [typehint]


def known_settings(parser: ArgumentParser) -> set[str]:
    """Keys of all settings of a parser, those of fields too."""
    keys = {action.dest for action in parser._actions if action.dest and not action.dest.endswith("help")}
    nested = nested_settings(parser)
    return keys | {f"{key}.{entry.name}" for key, kind in nested.items() for entry in fields(kind)}


def misplaced(setting: Setting, parser: ArgumentParser, verb: str) -> str | None:
    """What is wrong with where a setting stands."""
    key = setting.key.removesuffix("+")
    known, nested = known_settings(parser), nested_settings(parser)
    nullable = key in nested and _accepts_null(_typehint(parser, key))
    if key in GROUPS or (key in nested and not (nullable and setting.value is None)):
        return f"{setting.origin}: {key}: expected settings by name, got {shown(setting.value)}"
    parent = next((parent for parent in _parents(key) if parent in known), None)
    is_inside = parent is not None and parent not in nested and not _is_group(parent, known)
    if key in known or is_inside or key.endswith(("help", "print_config")):
        return None
    return f"{setting.origin}: no setting {key!r}{suggestion(key, known, verb)}"


def wrong_type(parser: ArgumentParser, key: str, value: Any) -> str | None:
    """What is wrong with a type that the parser lets pass: that of a mapping's field, or null for anything."""
    parent, _, name = key.rpartition(".")
    kind = nested_settings(parser).get(parent)
    typehint = _typehint(parser, key) if kind is None else get_type_hints(kind)[name]
    if value is None:
        return None if typehint is None or _accepts_null(typehint) else "expected a value, got null"
    if kind is None:
        return None
    parser = ArgumentParser(exit_on_error=False, parser_mode=strict_yaml.install())
    parser.add_class_arguments(kind)
    problem = _refused(lambda: parser.parse_object({name: value}))
    return problem and f"{reason(problem)}, got {shown(value)}"


def refuse(problems: Sequence[str]) -> NoReturn:
    """Say what is wrong with a command line, and exit with 2.

    Raises:
        SystemExit: always.
    """
    lines = [f"{len(problems)} problems:", *problems[:_MAX_PROBLEMS]] if len(problems) > 1 else [*problems]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"... and {len(problems) - _MAX_PROBLEMS:,} more")
    print("lit-lora: error: " + "\n  ".join(f"{line:.{_MAX_LINE}}" for line in lines), file=sys.stderr)
    raise SystemExit(2)


def shown(value: Any) -> str:
    """A value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def _checked(
    parser: ArgumentParser, setting: Setting, wrong: Callable[[str, Any], str | None]
) -> tuple[Any, str | None]:
    """The value as the parser understands it, and what is wrong with it by itself."""
    key, value = setting.key, setting.value
    if key.rpartition(".")[0] in nested_settings(parser):
        return value, wrong_type(parser, key, value) or wrong(key, value)
    parsed: list[Any] = []
    if problem := _refused(lambda: parsed.append(_parsed(parser, setting))):
        return None, _told(parser, key, problem, [], value)
    return parsed[0], wrong_type(parser, key, value) or wrong(key, parsed[0])


def _parsed(parser: ArgumentParser, setting: Setting) -> Any:
    base = parser.get_defaults(skip_validation=True)
    for action in _required(parser):
        base[action.dest] = "x"
    nested: Any = setting.value
    for part in reversed(setting.key.split(".")):
        nested = {part: nested}
    return parser.parse_object(nested, base).get(setting.key.removesuffix("+"))


def _required(parser: ArgumentParser) -> list[Any]:
    return [action for action in parser._actions if action.required]


def _accepted(parser: ArgumentParser, tokens: Sequence[str]) -> Any:
    """Parse these options beside what the parser insists on, so that it looks at them."""
    filled = [f"--{action.dest}=x" if action.option_strings else "x" for action in _required(parser)]
    return parser.parse_args([*filled, *tokens])


def _refused(parse: Callable[[], Any]) -> str | None:
    """What the parser says, without printing it."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parse()
    except _ERRORS as error:
        return str(error)
    return None


def _class_options(parser: ArgumentParser, given: Sequence[Option], known: set[str]) -> dict[str, list[str]]:
    """Options that name a class and its arguments, by setting: ``--trainer.callbacks+=X --trainer.callbacks.y 1``."""
    found: dict[str, list[str]] = {}
    for option in given:
        if option.key and option.key != CONFIG and (key := _class_setting(option.setting, known, parser)):
            found.setdefault(key, []).extend(option.tokens)
    return found


def _class_setting(key: str, known: set[str], parser: ArgumentParser) -> str | None:
    """The setting that a class is given for, where an option is that or an argument of the class."""
    setting = next((k for k in (key.removesuffix("+"), *_parents(key)) if k in known), None)
    if setting is None or setting in nested_settings(parser) or _is_group(setting, known):
        return None
    return setting if subclasses(_typehint(parser, setting)) else None


def _told(parser: ArgumentParser, key: str, message: str, tokens: Sequence[str], value: Any = None) -> str:
    """The parser's report in a line; for options it names the key, for a single setting the value."""
    known = {kind.__name__: kind for kind in subclasses(_typehint(parser, key.removesuffix("+")))}
    words = [str(word).rpartition(".")[2] for word in (*_class_names(value), *(_words(tokens)))]
    text = reason(message, classes=[known[word] for word in words if word in known], known=known, key=key)
    if tokens:
        return f"{key}: {text}"
    return text if known and not text.startswith("expected") else f"{text}, got {shown(value)}"


def _words(tokens: Sequence[str]) -> Iterator[str]:
    for option in options(tokens):
        if option.value is not None:
            yield option.value
            with contextlib.suppress(ValueError, strict_yaml.YAMLError):
                yield from _class_names(strict_yaml.parse(option.value))


def _class_names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield str(value.get("class_path", ""))
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _class_names(element)
    elif isinstance(value, str):
        yield value


def _typehint(parser: ArgumentParser, key: str) -> Any:
    return next((getattr(action, "_typehint", None) for action in parser._actions if action.dest == key), None)


def _accepts_null(typehint: Any) -> bool:
    return typehint is Any or NoneType in get_args(typehint)


def _is_group(key: str, known: set[str]) -> bool:
    return any(other.startswith(f"{key}.") for other in known)


def _parents(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
