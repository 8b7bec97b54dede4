"""Regular expressions of a configuration, matched against the names of modules within a time limit.

An expression in an adapter's files can be made to take longer than the universe has existed, and ``re`` cannot be
stopped: not by a thread, since it holds the interpreter, and not by a signal outside of the main thread. So whatever is
more than a plain name is matched in a process of its own, by this file run as a script, which starts in milliseconds
and is ended when its time is over. The ``regex`` package has a time limit, but takes unbounded memory to compile some
expressions, and its syntax is not quite that of ``re``, which PEFT uses.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator

LIMIT_S = 30.0
"""Time for all expressions of one field together; sensible ones take milliseconds, a few thousand some seconds."""
_MEMORY_BYTES = 1 << 30
_FEW_EXPRESSIONS, _FEW_PAIRS = 1000, 1_000_000
"""So many plain expressions, and pairs of one with a name, are matched at once, which takes less than a second."""


def find(
    field: str, expressions: dict[str, str], names: Iterable[str], *, whole: bool = False
) -> dict[str, dict[str, str]]:
    """Which expressions match which names.

    Args:
        field: of the configuration, for errors.
        expressions: as the user wrote each -> what is matched.
        names: of modules.
        whole: the whole name has to match, else its beginning.

    Returns:
        As the user wrote it -> names that match -> what the expression's group "index" caught, if it has one.

    Raises:
        ValueError: if one is no regular expression, or they take too long.
    """
    names = list(names)
    few = len(expressions) <= _FEW_EXPRESSIONS and len(expressions) * len(names) <= _FEW_PAIRS
    if few and all(re.fullmatch(r"[\w.-]{,1000}", text) for text in expressions):
        return dict(_matches(expressions, names, whole))
    return _in_a_process(field, expressions, names, whole)


def _matches(expressions: dict[str, str], names: list[str], whole: bool) -> Iterator[tuple[str, dict[str, str]]]:
    for text, expression in expressions.items():
        compiled = re.compile(expression)
        match = compiled.fullmatch if whole else compiled.match
        found = {name: hit.groupdict().get("index") or "" for name in names if (hit := match(name))}
        yield text, found


def _in_a_process(field: str, expressions: dict[str, str], names: list[str], whole: bool) -> dict[str, dict[str, str]]:
    import subprocess

    request = json.dumps([expressions, names, whole])
    output: str | bytes | None
    try:
        # -I and -S: nothing of the user's is imported.
        finished = subprocess.run(
            [sys.executable, "-I", "-S", __file__], input=request, capture_output=True, text=True, timeout=LIMIT_S
        )
        output = finished.stdout
    except subprocess.TimeoutExpired as expired:
        finished, output = None, expired.stdout
    lines = (output.decode() if isinstance(output, bytes) else output or "").splitlines()
    found: dict[str, dict[str, str]] = {}
    for text, line in zip(expressions, lines, strict=False):
        answer = json.loads(line)
        if isinstance(answer, str):
            raise ValueError(f"{field}: {shown(text)} is no regular expression: {answer}")
        found[text] = answer
    if len(found) == len(expressions):
        return found
    pending = next(text for text in expressions if text not in found)
    where = f"{field}: matching {shown(pending)} against {len(names)} names of modules"
    if finished is None:
        raise ValueError(
            f"{where} takes more than {LIMIT_S:g} s: write it without one repetition inside of another, or list names"
        )
    raise ValueError(f"{where} failed: {(finished.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def shown(text: str) -> str:
    """In quotes, and not longer than one can read."""
    return repr(text) if len(text) <= 100 else f"{text[:100]!r}..."


def _answer() -> None:
    """A line of JSON for each expression: the names that match, or the error."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    expressions, names, whole = json.load(sys.stdin)
    for text, expression in expressions.items():
        try:
            answer: object = dict(_matches({text: expression}, names, whole))[text]
        except (re.error, RecursionError, OverflowError) as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _answer()
