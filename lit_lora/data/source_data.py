"""The sources of a setting as tokenized data, one or several, and the prompts in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lit_lora.data.batches.loaders import prompts_of
from lit_lora.data.batches.mixture import Mixture, check_mixture, check_no_mixture
from lit_lora.data.batches.sampler import split_indices
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.tokenize import encode_examples
from lit_lora.data.prepared.dataset import ChosenExamples, Examples, TokenizedDataset
from lit_lora.data.prepared.prepare import SourceSettings, find_examples, tokenize_source
from lit_lora.data.rows.data_source import DataSource, RowsInMemory, described, sources_of
from lit_lora.data.rows.rows import Problems
from lit_lora.wording import setting


class SourceData:
    """Some sources, tokenized when they are asked for.

    Args:
        sources: one or more.
        settings: how they are read, where a source does not say.
        cache_dir: folder of the cache.
        num_workers: processes to tokenize with; None for as many as are worthwhile.
    """

    def __init__(
        self, sources: Sequence[DataSource], settings: SourceSettings, cache_dir: Path, num_workers: int | None
    ) -> None:
        self.sources = list(sources)
        self._settings = settings
        self._cache_dir = cache_dir
        self._num_workers = num_workers
        self._datasets: list[TokenizedDataset] = []

    @property
    def names(self) -> list[str]:
        """Of the sources, no two alike."""
        return [str(source.name) for source in self.sources]

    def plain(self) -> Any:
        """The sources in plain types: a name, or a list of settings."""
        entries = []
        for source in self.sources:
            given = {name: value for name, value in vars(source).items() if value is not None}
            entries.append(given | {"path": described(source.path)})
        return entries[0]["path"] if len(entries) == 1 and entries[0].keys() == {"path", "name"} else entries

    def set_date(self, date: str | None) -> None:
        """What a chat template that writes the date is told, see ``SFTDataModule``."""
        if date != self._settings.template_date:
            self._settings = replace(self._settings, template_date=date)
            self._datasets = []

    def settings_of(self, source: DataSource) -> SourceSettings:
        """How a source is read."""
        own = {name: getattr(source, name) for name in ("format", "columns", "limit")}
        return replace(self._settings, **{name: value for name, value in own.items() if value is not None})

    def datasets(self, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedDataset]:
        """Each source, tokenized."""
        if not self._datasets:
            self._datasets = [
                tokenize_source(
                    self.readable(source),
                    tokenizer,
                    self.settings_of(source),
                    cache_dir=self._cache_dir,
                    num_workers=self._num_workers,
                )
                for source in self.sources
            ]
        return self._datasets

    def examples(self, tokenizer: PreTrainedTokenizerBase) -> Examples:
        """All of them, source by source."""
        datasets = self.datasets(tokenizer)
        return datasets[0] if len(datasets) == 1 else ChosenExamples([(data, None) for data in datasets])

    def split(self, tokenizer: PreTrainedTokenizerBase, fraction: float, seed: int) -> tuple[Examples, Examples]:
        """Training and validation data: of each source the same share.

        Raises:
            ValueError: if a source has too few examples.
        """
        datasets = self.datasets(tokenizer)
        try:
            chosen = [split_indices(len(data), fraction, seed) for data in datasets]
        except ValueError as error:
            sizes = ", ".join(f"{name} {len(data):,}" for name, data in zip(self.names, datasets, strict=True))
            raise ValueError(f"{error} (examples: {sizes})" if len(datasets) > 1 else str(error)) from None
        train, validation = (
            ChosenExamples([(data, indices[part]) for data, indices in zip(datasets, chosen, strict=True)])
            for part in range(2)
        )
        return train, validation

    def mixture(self, examples: Examples) -> Mixture | None:
        """Which of these examples an epoch holds; None for each once."""
        mixture = Mixture.of(np.diff(examples.starts).tolist(), self.sources)
        return None if mixture.sizes == mixture.quotas else mixture

    def prompts(self, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Prompts and reference answers of some of the examples, read anew from the sources.

        Raises:
            ValueError: for plain text.
        """
        found: list[Example] = []
        for number, source in enumerate(self.sources):
            indices = range(examples.starts[number], examples.starts[number + 1])
            places = {index: examples.place(index) for index in indices}
            settings = self.settings_of(source)
            at_place = find_examples(self.readable(source), settings, set(places.values()))
            of_source: dict[int, Example] = {}
            for index, place in places.items():
                candidates = at_place[place]
                if len(candidates) > 1:  # of an array of JSON on a single line: the one that has these tokens
                    ids = examples[index].ids.tolist()
                    candidates = [one for one in candidates if _gives(one, ids, tokenizer, settings)]
                of_source.setdefault(id(candidates[0]), candidates[0])  # of a row that was split once
            found += of_source.values()
        return prompts_of(found, tokenizer, " and ".join(map(str, self.names)), self._settings.template_date)

    def readable(self, source: DataSource) -> Any:
        """A source as readers take it; rows in memory are written down for that."""
        if isinstance(source.path, RowsInMemory):
            try:
                return source.path.written(self._cache_dir / "rows")
            except OSError as error:
                fix = f"set {setting('data.cache_dir')} to a folder that can be written to"
                raise OSError(error.errno, f"rows in memory cannot be kept: {error}; {fix}") from error
        return source.path


def _gives(example: Example, ids: list[int], tokenizer: PreTrainedTokenizerBase, settings: SourceSettings) -> bool:
    encoded = encode_examples(tokenizer, [example], Problems(""), **settings.encoding())
    return any(one.ids == ids for one in encoded)


def source_data(
    key: str, given: Any, settings: SourceSettings, cache_dir: Path, num_workers: int | None, *, mixed: bool = False
) -> SourceData:
    """What a setting gives as data, see :class:`SourceData`.

    Args:
        key: of the setting.
        given: see :func:`~lit_lora.data.rows.data_source.sources_of`.
        settings: how sources are read, where they do not say.
        cache_dir: folder of the cache.
        num_workers: processes to tokenize with.
        mixed: whether sources may have weights or epochs.

    Raises:
        ValueError: for something else than sources, or weights that make no sense.
    """
    sources = sources_of(given, key)
    (check_mixture if mixed else check_no_mixture)(sources, key)
    return SourceData(sources, settings, cache_dir, num_workers)
