"""``lit-lora completion``: a script that lets a shell complete verbs, options, their values and names of files.

The script holds all it needs, so that a TAB starts no Python. It is made of the parsers themselves. shtab and
argcomplete are left out: the one does not complete after ``--option=``, the other starts Python (and for ``fit``, torch
and Lightning) at each TAB.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import shlex
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, Literal

from lit_lora.base.known_models import KNOWN_MODELS
from lit_lora.cli.short_names import short_names
from lit_lora.cli.verbs import TOOLS, TRAINER_VERBS

OWN_AND_FIT = ("data", "estimate", "init", "sweep")
"""Verbs that have a parser of their own, and take the options of ``fit`` beside it."""
SHORT = ("data", "init")
"""Of these, those that take settings by short names, too."""

_ZSH = """(( $+functions[compdef] )) || { autoload -U +X compinit && compinit; }
autoload -U +X bashcompinit && bashcompinit
"""

_SCRIPT = """# Made by: lit-lora completion {shell}
{head}_lit_lora() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="${{COMP_WORDS[1]}}"
    local prefix="" offered=""
    if [[ "$word" == "=" ]]; then
        word=""
    elif [[ "$before" == "=" ]]; then
        before="${{COMP_WORDS[COMP_CWORD-2]}}"
    elif [[ "$word" == --*=* ]]; then
        before="${{word%%=*}}"
        prefix="$before="
        word="${{word#*=}}"
    fi
    COMPREPLY=()
    if (( COMP_CWORD == 1 )); then
        offered={verbs}
    elif [[ "$word" == -* ]]; then
        case "$verb" in
{options}
        esac
    else
        case "$verb $before" in
{values}
        esac
    fi
    if [[ -n "$offered" ]]; then
        COMPREPLY=( $(compgen -P "$prefix" -W "$offered" -- "$word") )
    fi
}}
complete -o bashdefault -o default -F _lit_lora lit-lora
"""


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script that completes verbs, options, their values and names of files.

    For bash: lit-lora completion bash > ~/.local/share/bash-completion/completions/lit-lora. For zsh: lit-lora
    completion zsh > ~/.lit-lora.zsh, and a line "source ~/.lit-lora.zsh" in ~/.zshrc.

    Args:
        shell: that the script is for.
    """
    verbs = [*TRAINER_VERBS, *TOOLS]
    options = {verb: _options(verb) for verb in verbs}
    of_words: dict[str, list[str]] = {}
    of_values: dict[str, list[str]] = {}
    for verb, values in options.items():
        of_words.setdefault(_words(name for name in values if name.startswith("-")), []).append(verb)
        for name, listed in values.items():
            if listed:
                of_values.setdefault(_words(listed), []).append(f'"{verb} {name}"')
    cases = {name: _cases(found) for name, found in (("options", of_words), ("values", of_values))}
    print(_SCRIPT.format(shell=shell, head=_ZSH if shell == "zsh" else "", verbs=_words(verbs), **cases), end="")


def _cases(found: dict[str, list[str]]) -> str:
    return "\n".join(f"            {'|'.join(patterns)}) offered={words};;" for words, patterns in found.items())


def _words(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _options(verb: str) -> dict[str, list[str]]:
    """The options of a verb with the values that each can have, if those are few; under its name, its first word's."""
    if verb in TRAINER_VERBS:
        return _of_trainer(verb)
    module = importlib.import_module(f"lit_lora.tools.{verb}")
    if verb in OWN_AND_FIT:
        of_fit = _of_trainer("fit")
        short = {f"--{name}": of_fit[f"--{key}"] for name, key in short_names().items()} if verb in SHORT else {}
        return {**_named(module.own_options()), **short, **of_fit}
    return _of_function(getattr(module, verb))


def _named(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    return {name: [str(value) for value in action.choices or ()]
            for action in parser._actions for name in action.option_strings if name.startswith("--")}  # fmt: skip


@cache
def _of_trainer(verb: str) -> dict[str, list[str]]:
    from lit_lora.cli.lightning_cli import settings_of_verb

    return {**_of_settings(settings_of_verb(verb)), "--model.base": list(KNOWN_MODELS), "--print_config": []}


def _of_function(function: Callable[..., Any]) -> dict[str, list[str]]:
    from jsonargparse import ArgumentParser

    from lit_lora.cli.help import settings_of

    parser = ArgumentParser()
    parser.add_function_arguments(function, as_positional=False)
    found = _of_settings(settings_of(parser))
    first = next(iter(inspect.signature(function).parameters))
    found |= {"--config": [], "--print_config": []}
    return {**found, function.__name__: list(KNOWN_MODELS) if function.__name__ == "fetch" else found[f"--{first}"]}


def _of_settings(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    from lit_lora.cli.help import value_choices

    found = {f"--{key}": value_choices(getattr(action, "_typehint", None)) for key, action in settings.items()}
    return {**found, "--help": []}
