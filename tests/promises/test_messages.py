"""The messages that ``docs/troubleshooting.md`` explains are those of the code."""

from __future__ import annotations

import re

import pytest

from tests.promises.sentences import PROJECT

PAGE = (PROJECT / "docs/troubleshooting.md").read_text()
MESSAGES = [
    message for row in re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE) for message in re.findall(r"`([^`]+)`", row)
]
SOURCE = " ".join(
    re.sub(r'"\s*\n\s*f?"', "", path.read_text())
    for folder in ("lit_lora", "callbacks")
    for path in sorted((PROJECT / folder).rglob("*.py"))
)


@pytest.mark.parametrize("message", MESSAGES)
def test_it_is_said_somewhere(message):
    parts = [part.strip(" ,:()") for part in re.split(r"\.\.\.|: convergence|NOT PROVED|NOT JUDGED|'", message)]
    for part in filter(None, parts):
        assert part in SOURCE, part
