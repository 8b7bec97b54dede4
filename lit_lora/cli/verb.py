"""The command line of a verb that is a function: its parameters are the options, and mistakes get one report.

A required parameter can be given by its place or by its name, ``--adapter runs/x/adapter``. A last one that is a list
takes all words that are left, an option that is a list of numbers all numbers behind it, and one that is a list of
words can be given several times.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from lit_lora.cli.command_line import in_order, options, settings, with_flag_values
from lit_lora.cli.parse_errors import reason
from lit_lora.cli.setting_check import look_at_each, refuse
from lit_lora.files import strict_yaml
from lit_lora.wording import for_command_line


def call(function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Run a verb's function with the arguments of a command line.

    Raises:
        SystemExit: after naming what is wrong with them.
    """
    verb = function.__name__
    flags = {f"--{name}" for name, p in inspect.signature(function).parameters.items() if isinstance(p.default, bool)}
    listed = _as_list(function, _numbers_as_list(function, with_flag_values(arguments, flags)))
    listed = _repeated_as_list(function, listed)
    given = in_order(_by_place(function, listed))
    unreadable: list[str] = []
    known = set(inspect.signature(function).parameters)
    if list(settings(given, known, unreadable)) and unreadable:
        refuse(unreadable)

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if os.environ.get("LIT_LORA_TRACEBACK") and ex is not None:
                raise ex
            if not self.exit_on_error:
                raise ValueError(message) from ex
            self.exit_on_error = False
            refuse(look_at_each(self, given, verb).problems or [f"{reason(str(message))} (see lit-lora {verb} --help)"])

    with for_command_line(inspect.signature(function).parameters):
        auto_cli(
            function,
            args=given,
            as_positional=True,
            parser_class=Parser,
            prog=f"lit-lora {verb}",
            parser_mode=strict_yaml.install(),
            allow_abbrev=False,
        )


def _as_list(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """The words of a list in one, as YAML writes it."""
    required = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if not required or not str(required[-1].annotation).startswith("list["):
        return list(arguments)
    given = options(arguments)
    words = [option.tokens[0] for option in given if not option.key]
    by_name = {option.key for option in given}
    first = sum(p.name not in by_name for p in required[:-1])
    if len(words) <= first or required[-1].name in by_name:
        return list(arguments)
    rest = [token for option in given if option.key for token in option.tokens]
    return [*words[:first], json.dumps(words[first:]), *rest]


def _numbers_as_list(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """``--weights 0.7 0.3`` with the numbers in one word, as YAML writes a list."""
    parameters = inspect.signature(function).parameters.values()
    lists = [f"--{p.name}" for p in parameters if str(p.annotation).startswith(("list[float]", "list[int]"))]
    found: list[str] = []
    rest = list(arguments)
    while rest:
        found.append(rest.pop(0))
        if found[-1] in lists:
            numbers = list(itertools.takewhile(_is_number, rest))
            found += [f"[{','.join(numbers)}]"] if numbers else []
            del rest[: len(numbers)]
    return found


def _repeated_as_list(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """``--adapter a --adapter b`` as one option; ``--adapter a b`` too, where nothing else is given by its place."""
    parameters = inspect.signature(function).parameters.values()
    lists = {p.name for p in parameters if p.default is not p.empty and str(p.annotation).startswith("list[str]")}
    takes_words = all(p.default is not p.empty for p in parameters)
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    last = ""
    for option in options(arguments):
        if option.key in lists and option.value is not None:
            found.setdefault(option.key, []).append(option.value)
            last = option.key
        elif last and not option.key and takes_words:
            found[last] += option.tokens
        else:
            rest += option.tokens
            last = ""
    return [
        *rest,
        *(f"--{name}={values[0] if len(values) == 1 else json.dumps(values)}" for name, values in found.items()),
    ]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _by_place(function: Callable[..., Any], arguments: Sequence[str]) -> list[str]:
    """Required parameters that are given by name, moved to their place; of a list, all that are given so."""
    parameters = inspect.signature(function).parameters.values()
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    lists = {parameter.name for parameter in required if str(parameter.annotation).startswith("list[")}
    given = options(arguments)
    named: dict[str, str] = {}
    for parameter in required:
        values = [option.value for option in given if option.key == parameter.name and option.value is not None]
        if values:
            as_list = parameter.name in lists and not values[0].startswith("[")
            named[parameter.name] = json.dumps(values) if as_list else values[-1]
    if not named:
        return list(arguments)
    words = [option.tokens[0] for option in given if not option.key]
    placed = [named[p.name] if p.name in named else words.pop(0) for p in required if p.name in named or words]
    rest = [token for option in given if option.key and option.key not in named for token in option.tokens]
    return [*placed, *words, *rest]
