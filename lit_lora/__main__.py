"""``lit-lora``: picks the verb before anything heavy is imported."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from lit_lora.cli.interrupts import no_interrupt_lost
from lit_lora.cli.verbs import TOOLS, TRAINER_VERBS
from lit_lora.files.environment import ALLOCATION_VARIABLES, warn_of_unknown_variables
from lit_lora.files.meant import closest, did_you_mean

DIVIDED_TOOLS = ("generate", "evaluate")
"""Those that divide the base among the processes that torchrun starts."""

MOST_CHARACTERS = 16_000
"""Of an error message: one that quotes a hostile file, or that a library writes, may be of any length."""

TRACEBACK_VARIABLE = "LIT_LORA_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Exits with 0 if all went well, 1 for an error, 2 for a mistake on the command line, 3 for a fit that failed one of
    its checks, 130 after Ctrl-C, 143 after a termination.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return
    verb = arguments[0]
    if verb == "--version":
        from lit_lora import __version__

        print(f"lit-lora {__version__}")
        return
    if verb not in TRAINER_VERBS and verb not in TOOLS:
        known = [*TRAINER_VERBS, *TOOLS]
        hint = did_you_mean(closest(verb, known)) or f"known are {', '.join(known)}"
        _fail(f"no verb {verb!r}: {hint}", code=2)
    warn_of_unknown_variables()
    for name, value in ALLOCATION_VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        with no_interrupt_lost():
            _run(verb, arguments)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except SystemExit as error:
        if type(error).__name__ != "SIGTERMException":  # Lightning's; not imported for its name's sake
            raise
        # The other ranks of a run end in order: Lightning's launcher would kill the first one, seeing them fail.
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            _fail("terminated", code=143)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        # Messages of ours say what to do. What went wrong inside a library needs its traceback, so it can be asked for.
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        failed_check = "NotProvedError" in (kind.__name__ for kind in type(error).__mro__)  # nor imported for its name
        _fail(f"{error}\n(set {TRACEBACK_VARIABLE}=1 to see where)", code=3 if failed_check else 1)


def _run(verb: str, arguments: list[str]) -> None:
    if verb in TOOLS:
        _run_tool(verb, arguments[1:])
        return
    from lit_lora.cli.lightning_cli import run

    run(arguments)


def _run_tool(verb: str, arguments: list[str]) -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        with _log_shown():
            _call_tool(verb, arguments)
        return
    if verb not in DIVIDED_TOOLS:
        raise ValueError(
            f"{verb} runs in one process: start it without torchrun ({', '.join(DIVIDED_TOOLS)} divide it)"
        )
    from lit_lora.evaluation.divided import among_processes

    with among_processes(), _log_shown() if os.environ["RANK"] == "0" else contextlib.nullcontext():
        _call_tool(verb, arguments)


@contextlib.contextmanager
def _log_shown() -> Iterator[None]:
    """What our functions note is a line for whoever called the verb, beside its output."""
    log, handler = logging.getLogger("lit_lora"), logging.StreamHandler(sys.stderr)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _call_tool(verb: str, arguments: list[str]) -> None:
    function = getattr(importlib.import_module(f"lit_lora.tools.{verb}"), verb)
    if list(inspect.signature(function).parameters) == ["arguments"]:  # it reads the command line itself
        function(arguments)
        return
    from lit_lora.cli.verb import call

    call(function, arguments)


def _fail(message: str, *, code: int) -> NoReturn:
    cut = f"... ({len(message) - MOST_CHARACTERS:,} more characters)" if len(message) > MOST_CHARACTERS else ""
    print(f"lit-lora: error: {message[:MOST_CHARACTERS]}{cut}", file=sys.stderr)
    raise SystemExit(code)


def _help() -> str:
    lines = ["usage: lit-lora VERB [options]", "", "LoRA and QLoRA fine-tuning, where every run proves itself.", ""]
    lines += [f"  {verb:<12}{text}" for verb, text in {**TRAINER_VERBS, **TOOLS}.items()]
    lines += ["", "lit-lora VERB --help shows a verb's options. To start: lit-lora fetch, then",
              "lit-lora fit --config quickstart.yaml"]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
