"""From a source's name to a tokenized dataset: read, check, tokenize, cache."""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lit_lora.data.chats.formats import Example, Examples, layout_of, parse_examples
from lit_lora.data.prepared.array_file import InMemory
from lit_lora.data.prepared.dataset import (
    DatasetStatistics,
    TokenizedDataset,
    cache_path,
    load_cached,
    tokenizer_digest,
)
from lit_lora.data.prepared.tokenizing import Tokenized, tokenized
from lit_lora.data.rows.readers import rows_of
from lit_lora.data.rows.sources import Problems, Row, files_of, name_of, read_blocks, read_rows, source_digest
from lit_lora.data.rows.waiting import one_at_a_time, say, warn_not_cached
from lit_lora.files.atomic import atomic_write
from lit_lora.wording import advice

PARTS = ".parts"
"""How the folder of finished blocks ends, beside the file of the cache that they are for."""

ABANDONED_PARTS_S = 7 * 24 * 3600.0
"""Age at which nobody will go on with finished blocks."""


@dataclass(frozen=True)
class SourceSettings:
    """How a source is read and tokenized."""

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    max_length: int = 1024
    train_on_prompt: bool = False
    limit: int | None = None
    on_bad_rows: Literal["error", "drop"] = "error"
    train_on_turns: Literal["all", "last"] = "all"
    reasoning: Literal["keep", "mask", "drop"] = "keep"
    long_rows: Literal["truncate", "drop", "split"] = "truncate"
    ignore_columns: list[str] = field(default_factory=list)
    template_date: str | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 row, got {self.limit}")
        if self.on_bad_rows not in ("error", "drop"):
            raise ValueError(f"on_bad_rows must be 'error' or 'drop', got {self.on_bad_rows!r}")
        if self.template_date is not None and not _is_date(self.template_date):
            raise ValueError(f"template_date must be a day as YYYY-MM-DD, got {self.template_date!r}")
        if self.train_on_prompt and self.train_on_turns != "all":
            raise ValueError("train_on_turns has no effect beside train_on_prompt, which learns all: set one of them")

    def encoding(self) -> dict[str, Any]:
        """What :func:`encode_examples` is told."""
        names = ("max_length", "train_on_prompt", "train_on_turns", "reasoning", "long_rows")
        return {name: getattr(self, name) for name in names} | {
            "ignore": self.ignore_columns,
            "date": self.template_date,
        }


def read_examples(source: Any, settings: SourceSettings) -> Examples:
    """Read a source and bring every row into the internal form.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if nothing can be read, or rows are bad and ``settings.on_bad_rows`` is "error".
    """
    problems = Problems(name_of(source))
    rows = itertools.islice(read_rows(source, problems), settings.limit)
    examples = Examples(problems=problems)
    if (first := next(rows, None)) is not None:
        layout = layout_of(first, problems.file or problems.source, settings.format, settings.columns)
        examples.format = layout.format
        counted = _counted(itertools.chain([first], rows), examples)
        examples.items = parse_examples(counted, problems, layout, ignore=settings.ignore_columns)
    check_problems(problems, len(examples.items), settings)
    return examples


def find_examples(source: Any, settings: SourceSettings, places: Collection[str]) -> dict[str, list[Example]]:
    """The examples at some places of a source, see :meth:`TokenizedDataset.place`; a line of JSON may hold several."""
    found: dict[str, list[Example]] = {}
    layout = None
    for block in read_blocks(source):
        problems = Problems(name_of(source))
        for row in rows_of(block, problems):
            place = f"{block.file}, line {row.line}"
            layout = layout or layout_of(row, block.file, settings.format, settings.columns)
            if place in places:
                found.setdefault(place, []).extend(parse_examples([row], problems, layout))
    return found


def tokenize_source(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    settings: SourceSettings,
    *,
    cache_dir: Path,
    num_workers: int | None = None,
) -> TokenizedDataset:
    """The tokenized examples of a source, from the cache where it was tokenized before.

    One process at a time tokenizes; others, of this run or another, wait for the file that it makes.

    Args:
        source: see :func:`lit_lora.data.rows.sources.read_blocks`.
        tokenizer: the model's.
        settings: how to read and tokenize.
        cache_dir: folder of the cache; made if needed.
        num_workers: processes to tokenize with; by default one for each core where there is enough to do, else none
            beside this one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the data cannot be trained on, or changes meanwhile; the message names lines and the fix.
    """
    name = name_of(source)
    digest = source_digest(source)
    path = cache_path(cache_dir, {"source": digest, "tokenizer": tokenizer_digest(tokenizer), **asdict(settings)})
    parts = path.with_suffix(PARTS)
    files = [str(file) for file in files_of(source) or ()] if isinstance(source, str) else []
    files = files if len(files) > 1 else []
    was_there = path.exists()
    if (dataset := load_cached(path, name, files)) is not None:
        return dataset
    with one_at_a_time(path.with_suffix(".lock"), f"another process is tokenizing {name}") as waited:
        if (waited or not was_there) and (dataset := load_cached(path, name, files)) is not None:
            return dataset
        if waited:
            say(f"the other process did not finish {name}: tokenizing the rest of it here")
        try:
            found = tokenized(
                source,
                tokenizer,
                lambda row, file: layout_of(row, file, settings.format, settings.columns),
                settings.encoding(),
                limit=settings.limit,
                folder=parts,
                num_workers=num_workers,
            )
        except MemoryError as error:  # a few kilobytes of Parquet can stand for gigabytes
            raise ValueError(
                f"a block of rows of {name} does not fit into memory: shorten its longest texts, or leave them out"
            ) from error
        if source_digest(source) != digest:
            raise ValueError(f"{name} changed while it was read: start again when it is complete")
        statistics = _statistics(found, name, files, settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"statistics": json.dumps(asdict(statistics))}
            atomic_write(path, lambda file: found.write(file, metadata))
        except OSError as error:
            warn_not_cached(error)
            return TokenizedDataset(InMemory(found.in_memory()), statistics)
        shutil.rmtree(parts, ignore_errors=True)
        return TokenizedDataset.load(path, source=name, files=files)


def remove_abandoned_parts(cache_dir: Path) -> None:
    """Delete finished blocks of sources that nobody has gone on with for a week."""
    for folder in cache_dir.glob(f"*{PARTS}"):
        if time.time() - folder.stat().st_mtime > ABANDONED_PARTS_S:
            shutil.rmtree(folder, ignore_errors=True)


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _statistics(found: Tokenized, name: str, files: list[str], settings: SourceSettings) -> DatasetStatistics:
    check_problems(found.problems, found.total("examples"), settings)
    if not found.total("kept"):
        raise ValueError(
            f"{name}: none of the {found.total('examples')} examples has a supervised token within "
            + advice("{}", "data.max_length", settings.max_length, otherwise=f"its first {settings.max_length} tokens")
            + ": the prompts alone are longer"
            + advice("; raise {}", "data.max_length", otherwise="")
        )
    return DatasetStatistics(
        source=name,
        format=found.format,
        num_rows=found.total("rows"),
        num_duplicates=found.num_duplicates(),
        num_truncated=found.total("truncated"),
        num_unsupervised=found.total("unsupervised"),
        num_bad_rows=found.problems.count,
        bad_rows=found.problems.shown,
        notes=dict(found.problems.notes),
        files=files,
        file_starts=found.file_starts(files),
    )


def _counted(rows: Iterable[Row], examples: Examples) -> Iterator[Row]:
    for row in rows:
        examples.num_rows += 1
        yield row


def check_problems(problems: Problems, num_good: int, settings: SourceSettings) -> None:
    """Check that there is what to train on, and no bad row where that is asked for.

    Raises:
        ValueError: with the report.
    """
    if problems.count and settings.on_bad_rows == "error":
        raise ValueError(
            f"{problems.source}: {problems.count} bad rows ({num_good} are good):\n{problems}\n"
            + advice("Correct them, or {} to skip them", "data.on_bad_rows", "drop", otherwise="Correct them")
        )
    if not num_good:
        detail = f"; all {problems.count} rows are bad:\n{problems}" if problems.count else ""
        raise ValueError(f"{problems.source} holds no examples: expected at least one row of data{detail}")
