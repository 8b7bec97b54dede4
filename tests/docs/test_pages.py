"""The site of the pages (``make docs``) has every page in its navigation, and every public name in its reference."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
FROM_OUTSIDE = {"overview.md", "contributing.md", "changelog.md", "benchmarks/results/index.md"}
"""Pages that ``docs/site.py`` makes of files outside of ``docs/``."""


def pages_in(navigation: Any) -> Iterator[str]:
    """Leaves of the navigation, in their order."""
    if isinstance(navigation, str):
        yield navigation
    for part in navigation.values() if isinstance(navigation, dict) else navigation:
        if not isinstance(navigation, str):
            yield from pages_in(part)


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(pages_in(SITE["nav"]))
    assert sorted(listed) == sorted(PAGES | FROM_OUTSIDE)


def test_every_page_is_linked_from_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w./]+\.md)\)", (ROOT / "docs/index.md").read_text(encoding="utf-8")))
    assert PAGES - linked == {"index.md"}


@pytest.mark.parametrize("module", ["lit_lora", "lit_lora.callbacks"])
def test_every_public_name_is_in_the_reference(module: str) -> None:
    page = ROOT / "docs/reference" / f"{module.rpartition('.')[2]}.md"
    referred = re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    public = set(importlib.import_module(module).__all__) - {"__version__"}
    assert sorted(referred) == sorted(f"{module}.{name}" for name in public)


def test_the_site_asks_nothing_of_the_network() -> None:
    """In its settings; ``test_site.py`` looks at what is built."""
    assert SITE["theme"]["font"] is False
    assert not re.search(r"https?://", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert not {"extra_javascript", "repo_url"} & set(SITE)
