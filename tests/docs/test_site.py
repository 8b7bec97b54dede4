"""The site that ``make docs`` builds: strictly, with nothing from elsewhere, and with links that lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="make docs installs it")
pytestmark = [pytest.mark.site, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """What a page loads, where it leads, and what can be led to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if "src" in given:
            self.loaded.append(given["src"])
        if "href" in given:
            (self.links if tag == "a" else self.loaded).append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # The reference is formatted by ruff, which is found beside Python; the theme announces its successor otherwise.
    found = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env={**os.environ, **found}, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def test_a_page_loads_only_what_lies_beside_it(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 50
    for path, page in pages.items():
        names = [name for name in page.loaded if not name.startswith("data:")]
        assert names
        assert [name for name in names if not (path.parent / name.partition("#")[0]).exists()] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", style.read_text(encoding="utf-8")), style


def test_links_between_pages_lead_somewhere(pages: dict[Path, Page]) -> None:
    gone, inside = [], 0
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"https?:|mailto:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            inside += 1
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                gone.append((path.name, link))
    assert inside > 1000
    assert gone == []


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("reference/lit_lora.html", "Fine-tune from a script"),
        ("reference/callbacks.html", 'id="lit_lora.callbacks.MemoryProfiler"'),
        ("overview.html", 'href="runs.html#a-page-to-look-at"'),
        ("qlora.html", 'href="benchmarks/results/merge_memory.html"'),
        ("speed.html", 'href="benchmarks/results/index.html"'),
        ("index.html", 'href="contributing.html"'),
        ("benchmarks/results/index.html", 'href="llama_cpp.html"'),
    ],
)
def test_pages_have_what_they_are_made_of(page: str, text: str, site: Path) -> None:
    assert text in (site / page).read_text(encoding="utf-8")
