"""What the Markdown files of the repository point to is there: files, headings, pictures, and paths named in code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "configs/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
TOPS = ("lit_lora", "callbacks", "configs", "docs", "tests", "benchmarks", ".ci")
TELL_OF_THE_PAST = ("CHANGELOG.md", "benchmarks/")
"""Files that may name what has gone since, in code; their links have to lead somewhere all the same."""

_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_TARGET = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s+(\S+)|(?:src|href)=\"([^\"]+)\"", re.M
)


def targets(text: str) -> list[str]:
    """Where links and pictures lead, outside of code."""
    prose = _CODE.sub("", _FENCED.sub("", text))
    return [next(filter(None, match.groups())) for match in _TARGET.finditer(prose)]


def paths_in_code(text: str) -> list[str]:
    """Spans of code that are a path below a folder of the repository, perhaps a pattern."""
    below = re.compile(rf"(?:{'|'.join(map(re.escape, TOPS))})/[\w./*-]*")
    return [span for span in _CODE.findall(_FENCED.sub("", text)) if below.fullmatch(span)]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?)\s*#*$", _FENCED.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        taken = sum(1 for name in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", name))
        found.add(f"{slug}-{taken}" if taken else slug)
    return found


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def broken(file: Path, text: str, root: Path = ROOT) -> list[str]:
    """What a file points to in vain."""
    found = []
    for target in targets(text):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z][a-z+.-]*:", name):
            if not re.match(r"https?://[\w.-]+\.\w+(/|$)|mailto:", name):
                found.append(f"{target}: not an address")
            continue
        path = file.parent / name
        if name.startswith("/") or not path.exists() or root not in [path.resolve(), *path.resolve().parents]:
            found.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(text_of(path) if name else text):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    assert broken(ROOT / name, text_of(ROOT / name)) == []


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(TELL_OF_THE_PAST)])
def test_paths_in_code_are_there(name: str) -> None:
    gone = [path for path in paths_in_code(text_of(ROOT / name)) if not any(ROOT.glob(path.rstrip("/")))]
    assert gone == []


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith(TELL_OF_THE_PAST)])
def test_modules_in_code_are_there(name: str) -> None:
    """Named by their file alone, as ``trial.py``."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", _FENCED.sub("", text_of(ROOT / name))))
    there = [path.as_posix() for top in TOPS for path in ROOT.glob(f"{top}/**/*.py")]
    assert [path for path in sorted(named) if not any(f"/{path}" in f"/{full}" for full in there)] == []


def test_all_of_it_is_looked_at() -> None:
    assert len(FILES) > 50
    assert {"README.md", "docs/index.md", "benchmarks/NOTES.md"} <= set(FILES)
    assert sum(len(targets(text_of(ROOT / name))) for name in FILES) > 120
    assert sum(len(paths_in_code(text_of(ROOT / name))) for name in FILES) > 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](there.md)", []),
        ("[a](there.md#two-words)", []),
        ("[a](there.md#two-words-1)", []),
        ("# Here\n\n[a](#here)", []),
        ("`[a](gone.md)`\n\n```\n[a](gone.md)\n```", []),
        ("[a](https://example.com/x)", []),
        ("[a](gone.md)", ["gone.md: no such file"]),
        ("![a](gone.png)", ["gone.png: no such file"]),
        ('<img src="gone.png">', ["gone.png: no such file"]),
        ("[a]: gone.md", ["gone.md: no such file"]),
        ("[a](there.md#one-word)", ["there.md#one-word: no such heading"]),
        ("[a](#here)", ["#here: no such heading"]),
        ("[a](../outside.md)", ["../outside.md: no such file"]),
        ("[a](https://localhost)", ["https://localhost: not an address"]),
    ],
)
def test_a_broken_link_is_found(text: str, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "outside.md").write_text("")
    root = tmp_path / "root"
    root.mkdir()
    (root / "there.md").write_text("# Two `words`\n\n## Two words\n")
    assert broken(root / "page.md", text, root) == said
