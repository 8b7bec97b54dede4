"""SFTDataModule: instruction data for supervised fine-tuning, with a position that survives a stop.

Tokenizes once (cached), packs batches without padding, and knows at any moment which micro-batches have been trained
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from lit_lora.data.batches.evaluation_batches import OrderedBatchSampler, plan_in_order
from lit_lora.data.batches.fingerprint import check_fingerprint, fingerprint_of
from lit_lora.data.batches.limits import check_limits, check_own_sampler, check_settings
from lit_lora.data.batches.loaders import batch_loader, prompt_loader, prompts_of_rank
from lit_lora.data.batches.mixture import Mixture
from lit_lora.data.batches.resume import check_not_resumed, rank_batches_consumed
from lit_lora.data.batches.sampler import BatchSettings, ResumableBatchSampler, plan_batches
from lit_lora.data.data_record import data_record
from lit_lora.data.look.summary import DataSummary, summarize
from lit_lora.data.named_tokenizer import loaded_tokenizer
from lit_lora.data.new_tokens import NewTokens
from lit_lora.data.prepared.dataset import Examples, lines_of, tokenizer_digest
from lit_lora.data.prepared.prepare import SourceSettings, remove_abandoned_parts
from lit_lora.data.rows.data_source import Given
from lit_lora.data.run_date import date_of_run
from lit_lora.data.source_data import source_data
from lit_lora.data.untrained_tokens import warn_of_untrained_tokens
from lit_lora.files.atomic import remove_partial_files
from lit_lora.files.environment import cache_folder
from lit_lora.wording import setting

DEFAULT_BATCH_SIZE = 4
ABANDONED_S = 3600.0
"""Age at which no process can be writing a temporary file of the cache any more."""


class SFTDataModule(pl.LightningDataModule):
    """Instruction data for supervised fine-tuning.

    Args:
        train: training data: a .json, .jsonl, .csv or .parquet file (or .gz or .zst of one), a folder or pattern of
            them, a folder of ``save_to_disk``, or a Hub dataset (``name``, ``name:config``, ``name@split``); or a list
            of sources, each such a name or a ``DataSource`` with weight or epochs. In Python also a
            ``datasets.Dataset`` or an iterable of dicts.
        validation: validation data, as for train; of several sources each has a loss of its own, ``val_loss/NAME``.
        validation_fraction: share of ``train`` to validate on, of each of its sources, if ``validation`` is not given.
        test: test data, as for train; the validation data if not given.
        format: "alpaca", "sharegpt", "messages", "prompt_completion", "text", or "auto" to tell by the columns.
        columns: names that differ from the format's, for example ``{"prompt": "question", "completion": "answer"}``.
        tokenizer: tokenizer, or name or folder of one; by default that of the module's ``base``.
        new_tokens: tokens to add to the tokenizer; their embeddings are trained, and saved with the adapter.
        max_length: longest example in tokens; longer ones lose their end.
        batch_size: most examples in a micro-batch; 4 if neither this nor ``max_tokens_per_batch`` is given.
        max_tokens_per_batch: most tokens in a micro-batch, padding included where batches are padded.
        packing: put the examples of a batch one after the other instead of padding them.
        shuffle: visit the training data in a different order every epoch.
        seed: seed of the order and of the validation split.
        num_workers: processes that assemble batches. The data is tokenized already, so 0 is enough.
        train_on_prompt: train on the prompts, too.
        limit: use only the first rows of ``train``, this many (of each source that has no limit of its own).
        on_bad_rows: "error" to refuse data with bad rows, "drop" to skip them.
        cache_dir: folder for tokenized data; by default ``$LIT_LORA_CACHE/tokenized``, or in ``~/.cache/lit_lora``.
        train_on_turns: "all" assistant turns are learned, or only the "last" of a conversation. A turn with ``weight``
            counts that much, one with ``weight: 0`` or ``train: false`` is not learned.
        reasoning: "keep" learns the reasoning of an answer where the chat template shows it, "mask" shows it without
            learning it, "drop" leaves it out.
        long_rows: rows over ``max_length``: "truncate" cuts off their end, "drop" leaves them out, "split" makes
            several examples of them: conversations between two exchanges, plain text anywhere.
        ignore_columns: columns, and keys of a turn, that are known not to be used.
        tokenize_workers: processes that tokenize; by default one for each core (16 at most) where the data is large,
            else only the run's own.
        template_date: the day, as YYYY-MM-DD, that a chat template is told which writes today's date; by default that
            on which the run began, also where it is resumed.
    """

    def __init__(
        self,
        train: Given,
        *,
        validation: Given | None = None,
        validation_fraction: float = 0.0,
        test: Given | None = None,
        format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto",
        columns: dict[str, str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        new_tokens: list[str] | None = None,
        max_length: int = 1024,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        packing: bool = True,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        train_on_prompt: bool = False,
        limit: int | None = None,
        on_bad_rows: Literal["error", "drop"] = "error",
        cache_dir: str | Path | None = None,
        train_on_turns: Literal["all", "last"] = "all",
        reasoning: Literal["keep", "mask", "drop"] = "keep",
        long_rows: Literal["truncate", "drop", "split"] = "truncate",
        ignore_columns: list[str] | None = None,
        tokenize_workers: int | None = None,
        template_date: str | None = None,
    ) -> None:
        super().__init__()
        check_settings(validation_fraction, validation is not None, tokenize_workers, num_workers)
        if batch_size is None and max_tokens_per_batch is None:
            batch_size = DEFAULT_BATCH_SIZE
        self.validation_fraction = validation_fraction
        self.source_settings = SourceSettings(
            format=format,
            columns=columns,
            max_length=max_length,
            train_on_prompt=train_on_prompt,
            limit=limit,
            on_bad_rows=on_bad_rows,
            train_on_turns=train_on_turns,
            reasoning=reasoning,
            long_rows=long_rows,
            ignore_columns=list(ignore_columns or []),
            template_date=template_date,
        )
        self.batch_settings = BatchSettings(
            batch_size=batch_size, max_tokens=max_tokens_per_batch, padded=not packing, shuffle=shuffle, seed=seed
        )
        self._given_date = template_date
        self.packing = packing
        self.num_workers = num_workers
        self.cache_dir = cache_folder("tokenized") if cache_dir is None else Path(cache_dir).expanduser()
        rest, options = replace(self.source_settings, limit=None), (self.cache_dir, tokenize_workers)
        self._train = source_data("data.train", train, self.source_settings, *options, mixed=True)
        self._validation = None if validation is None else source_data("data.validation", validation, rest, *options)
        self._test = None if test is None else source_data("data.test", test, rest, *options)
        self.train_data: Examples | None = None
        self.validation_data: Examples | None = None
        self.test_data: Examples | None = None
        self.summary: DataSummary | None = None
        self.new_tokens = NewTokens(new_tokens or [])
        self._tokenizer = tokenizer
        self._tokenizer_name: str | None = None
        self.mixture: Mixture | None = None
        self._train_sampler: ResumableBatchSampler | None = None
        self._loaded_state: dict[str, Any] | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._limit_val_batches: int | float | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use; code that comes with it runs where the module says ``trust_remote_code``.

        Raises:
            ValueError: see :func:`loaded_tokenizer`.
        """
        if not isinstance(self._tokenizer, PreTrainedTokenizerBase):
            module = None if self.trainer is None else self.trainer.lightning_module
            self._tokenizer, self._tokenizer_name = loaded_tokenizer(self._tokenizer, module)
        return self.new_tokens.added_to(self._tokenizer)

    def trained_on(self) -> dict[str, Any]:
        """What the record of an adapter says of this data; plain types."""
        assert self.train_data is not None, "setup() comes before trained_on()"
        format, added = self.train_data.statistics.format, {"new_tokens": self.new_tokens.tokens or None}
        return added | data_record(self.tokenizer, self.source_settings, name=self._tokenizer_name, format=format)

    def settings(self) -> dict[str, Any]:
        """What it was built with, for loggers."""
        tokenizer = self._tokenizer
        return {
            "train": self._train.plain(),
            "validation": None if self._validation is None else self._validation.plain(),
            "validation_fraction": self.validation_fraction,
            "test": None if self._test is None else self._test.plain(),
            "tokenizer": tokenizer if isinstance(tokenizer, str | None) else tokenizer.name_or_path or str(tokenizer),
            "new_tokens": self.new_tokens.tokens,
            **asdict(self.source_settings),
            **asdict(self.batch_settings),
        }

    def prepare_data(self) -> None:
        """Tidy up the cache, where killed runs may have left something.

        Tokenizing is left to :meth:`setup`: while one process is at it, the others wait for its file there, and not in
        a collective as Lightning has them do here.
        """
        remove_partial_files(self.cache_dir, older_than_s=ABANDONED_S)
        remove_abandoned_parts(self.cache_dir)

    def setup(self, stage: str) -> None:
        """Load the tokenized data.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            ValueError: if the Trainer would replace the sampler, or the data cannot be used.
        """
        if self.trainer is not None:
            check_own_sampler(self.trainer)
        self._train_sampler, self._loaded_state = None, None
        date = date_of_run(self._given_date, self.tokenizer, self.trainer)
        self.source_settings = replace(self.source_settings, template_date=date)
        for data in filter(None, (self._train, self._validation, self._test)):
            data.set_date(date)
        if self.validation_fraction:
            train, self.validation_data = self._train.split(
                self.tokenizer, self.validation_fraction, self.batch_settings.seed
            )
        else:
            train = self._train.examples(self.tokenizer)
            if self._validation is not None:
                self.validation_data = self._validation.examples(self.tokenizer)
        if self._test is not None:
            self.test_data = self._test.examples(self.tokenizer)
        self.mixture = self._train.mixture(train)
        self.train_data = train
        if stage == "fit":
            self._fingerprint = fingerprint_of(
                train,
                self.validation_data,
                self.batch_settings,
                self.mixture,
                {
                    **asdict(self.source_settings),
                    "train": self._train.plain(),
                    "validation_fraction": self.validation_fraction,
                    "tokenizer": tokenizer_digest(self.tokenizer)[:12],
                },
            )
            self.summary = summarize(train, self.tokenizer, self.batch_settings, self.validation_data, self.mixture)
            rank_zero_info(str(self.summary))
            if self.trainer is not None:
                check_limits(
                    self.trainer, lambda: self._num_batches(train), lambda: self._num_batches(self.validation_data)
                )
            if self.validation_data is None and self.trainer is not None:
                # Lightning warns about an empty list of loaders; this is how a Trainer without validation is asked for.
                self._limit_val_batches, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0

    def teardown(self, stage: str) -> None:
        """Give the Trainer back its validation setting.

        Args:
            stage: "fit", "validate", "test" or "predict".
        """
        if self._limit_val_batches is not None and self.trainer is not None:
            self.trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None

    def source_names(self, stage: str) -> list[str]:
        """Of the sources that are evaluated ("validate" or "test"), in the order that a batch's ``source`` counts."""
        of_validation = self._validation or self._train
        return (self._test or of_validation if stage == "test" else of_validation).names

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank, from the place where a loaded checkpoint stopped.

        Raises:
            ValueError: if a checkpoint was loaded and held no place in data of this class.
        """
        assert self.train_data is not None, "setup() comes before train_dataloader()"
        if self._train_sampler is None:
            if self._loaded_state is None:
                check_not_resumed(self)
            resume_from = None
            if self._loaded_state is not None:
                resume_from = (self._loaded_state["epoch"], rank_batches_consumed(self._loaded_state, self._world_size))
            settings = self.batch_settings
            if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
                settings = replace(settings, shuffle=False)
            self._train_sampler = ResumableBatchSampler(
                self.train_data.lengths,
                settings,
                rank=self._rank,
                world_size=self._world_size,
                resume_from=resume_from,
                progress=None if self.trainer is None else self._progress,
                mixture=self.mixture,
            )
        if self.train_data.statistics.format != "text":
            warn_of_untrained_tokens(self.trainer, self.tokenizer)
        return self._loader(self.train_data, self._train_sampler)

    def val_dataloader(self) -> DataLoader:
        """Validation batches, in the data's order."""
        if self.validation_data is None:
            names = f"{setting('data.validation')} or {setting('data.validation_fraction')}"
            raise ValueError(f"there is no validation data: set {names}")
        return self._evaluation_loader(self.validation_data)

    def test_dataloader(self) -> DataLoader:
        """Test batches: the validation data where there is no test data."""
        data = self.validation_data if self.test_data is None else self.test_data
        if data is None:
            names = f"{setting('data.test')}, {setting('data.validation')} or {setting('data.validation_fraction')}"
            raise ValueError(f"there is no test data: set {names}")
        return self._evaluation_loader(data)

    def source_lines(self, example_ids: Sequence[int]) -> list[int | str]:
        """See :func:`lit_lora.data.prepared.dataset.lines_of`."""
        assert self.train_data is not None, "setup() comes before source_lines()"
        return lines_of(self.train_data, example_ids)

    def predict_dataloader(self) -> DataLoader:
        """Prompts with reference answers, lists of 100: ``prompt_ids`` (1, L), ``reference``, ``example_ids`` (1,).

        From the test data, else the validation data, else the training data. Of a conversation the last answer is
        asked for.
        """
        pairs = (
            (self._test, self.test_data),
            (self._validation or self._train, self.validation_data),
            (self._train, self.train_data),
        )
        source, data = next((source, data) for source, data in pairs if data is not None)
        assert source is not None
        prompts = source.prompts(data, self.tokenizer)
        share = prompts_of_rank(prompts, self._rank, self._world_size)
        return prompt_loader(share, self.batch_settings.seed)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data and what it depends on; plain types."""
        if self._train_sampler is None:
            return dict(self._loaded_state or {})
        epoch, consumed = self._train_sampler.position()
        return {
            "epoch": epoch,
            "consumed": consumed * self._world_size,
            "micro_batches": self._train_sampler.num_global,
            "world_size": self._world_size,
            "fingerprint": self.fingerprint(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position; outside of training, do nothing.

        Raises:
            ValueError: if the data or a setting on which the position depends has changed.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        check_fingerprint(state_dict["fingerprint"], self.fingerprint())
        self._loaded_state = dict(state_dict)
        self._train_sampler = None

    def fingerprint(self) -> dict[str, Any]:
        """What a position in the data means; plain types.

        ``tokens`` is a digest of what is trained on, as it is in memory; ``order`` all that decides which example comes
        at which place; ``source`` all that made the tokens, to say why they differ; ``validation`` a digest likewise.
        """
        assert self._fingerprint is not None, "setup() comes before fingerprint()"
        return self._fingerprint

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _progress(self) -> tuple[int, float]:
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return batches.processed, self.trainer.num_training_batches  # type: ignore[attr-defined]

    def _num_batches(self, data: Examples | None) -> int:
        """Of this rank, in an epoch."""
        if data is None:
            return 0
        if data is self.train_data:
            plan = plan_batches(data.lengths, self.batch_settings, mixture=self.mixture)
        else:
            plan = plan_in_order(data.lengths, self.batch_settings, data.starts)
        return -(-len(plan) // self._world_size)

    def _evaluation_loader(self, data: Examples) -> DataLoader:
        sampler = OrderedBatchSampler(
            data.lengths, self.batch_settings, data.starts, rank=self._rank, world_size=self._world_size
        )
        return self._loader(data, sampler)

    def _loader(self, data: Examples, sampler: Sampler[list[int]]) -> DataLoader:
        return batch_loader(
            data,
            sampler,
            self.trainer,
            packed=self.packing,
            num_workers=self.num_workers,
            seed=self.batch_settings.seed,
        )
