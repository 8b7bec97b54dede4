"""Hooks of mkdocs: what lies outside of ``docs/`` becomes pages too, and links between files lead from page to page.

The Markdown is written for the repository, where a link is a path from file to file. Here each file has an address of
the site, and every relative link is worked out again from it.
"""

from __future__ import annotations

import os.path
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent
TOP = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the top of the repository -> their pages."""

RESULTS = "benchmarks/results"
_LINK = re.compile(r"```.*?^```|`[^`\n]*`|(?<=\]\()(?P<target>[^)#\s]+)", re.MULTILINE | re.DOTALL)
_kept: list[tempfile.TemporaryDirectory[str]] = []


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name headings as GitHub does, and lay the package out as in a wheel: the reference is read from the files."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    folder = tempfile.TemporaryDirectory(prefix="lit_lora_site_")
    _kept.append(folder)
    package = Path(folder.name, "lit_lora")
    package.mkdir()
    for path in [*(ROOT / "lit_lora").iterdir(), ROOT / "callbacks"]:
        (package / path.name).symlink_to(path)
    plugin: Any = config.plugins["mkdocstrings"]
    plugin.config.handlers["python"]["paths"] = [folder.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files at the top of the repository, the notes and the measurements."""
    for name, page in TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    results = sorted((ROOT / RESULTS).glob("*.md"))
    for path in [ROOT / "benchmarks/NOTES.md", *results]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted((ROOT / RESULTS).glob("*.png")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    lines = [f"- [{_title(path)}]({path.name})" for path in results]
    listed = "# Measurements\n\nWith the command, hardware and versions of each.\n\n" + "\n".join(lines) + "\n"
    files.append(File.generated(config, f"{RESULTS}/index.md", content=listed))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    if here == f"{RESULTS}/index.md":
        return markdown
    source = repository_path(here)
    return _LINK.sub(lambda match: _moved(match, source, here), markdown)


def repository_path(address: str) -> str:
    """The file of the repository that a page is made from."""
    outside = {page: name for name, page in TOP.items()}
    return outside.get(address, address if address.startswith("benchmarks/") else f"docs/{address}")


def site_path(path: str) -> str:
    """The page that a file, or a folder, of the repository becomes."""
    if path == RESULTS:
        return f"{RESULTS}/index.md"
    return TOP.get(path, path.removeprefix("docs/"))


def _moved(match: re.Match[str], source: str, here: str) -> str:
    target = match["target"]
    if target is None or "://" in target or target.startswith("mailto:"):
        return match[0]
    path = os.path.normpath(PurePosixPath(source).parent / target)
    return os.path.relpath(site_path(path), PurePosixPath(here).parent)


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
