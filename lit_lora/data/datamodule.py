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
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.data.data_record import data_record
from lit_lora.data.dataset import TokenizedDataset, check_vocabulary, tokenizer_digest
from lit_lora.data.limits import check_limits
from lit_lora.data.loaders import PromptDataset, ResumableDataLoader, only, prompts_of, prompts_of_rank
from lit_lora.data.packing import collate_packed, collate_padded
from lit_lora.data.prepare import SourceSettings, read_examples, tokenize_source
from lit_lora.data.resume import check_fingerprint, check_not_resumed, rank_batches_consumed
from lit_lora.data.sampler import BatchSettings, ResumableBatchSampler, plan_batches, split_indices
from lit_lora.data.summary import DataSummary, summarize
from lit_lora.files.atomic import remove_partial_files
from lit_lora.files.environment import cache_folder
from lit_lora.wording import setting

DEFAULT_BATCH_SIZE = 4
ABANDONED_S = 3600.0
"""Age at which no process can be writing a temporary file of the cache any more."""


class SFTDataModule(pl.LightningDataModule):
    """Instruction data for supervised fine-tuning.

    Args:
        train: training data: a .json, .jsonl, .csv or .parquet file, or a Hub dataset (``name``, ``name:config``,
            ``name@split``).
        validation: validation data: a file or Hub dataset, as for train.
        validation_fraction: share of ``train`` to validate on, if ``validation`` is not given.
        test: test data, as for train; the validation data if not given.
        format: "alpaca", "sharegpt", "messages", "prompt_completion", "text", or "auto" to tell by the columns.
        columns: names that differ from the format's, for example ``{"prompt": "question", "completion": "answer"}``.
        tokenizer: tokenizer, or name or folder of one; by default that of the module's ``base``.
        max_length: longest example in tokens; longer ones lose their end.
        batch_size: most examples in a micro-batch; 4 if neither this nor ``max_tokens_per_batch`` is given.
        max_tokens_per_batch: most tokens in a micro-batch, padding included where batches are padded.
        packing: put the examples of a batch one after the other instead of padding them.
        shuffle: visit the training data in a different order every epoch.
        seed: seed of the order and of the validation split.
        num_workers: processes that assemble batches. The data is tokenized already, so 0 is enough.
        train_on_prompt: train on the prompts, too.
        limit: use only the first rows of ``train``, this many.
        on_bad_rows: "error" to refuse data with bad rows, "drop" to skip them.
        cache_dir: folder for tokenized data; by default ``$LIT_LORA_CACHE/tokenized`` or
            ``~/.cache/lit_lora/tokenized``.
    """

    def __init__(
        self,
        train: str,
        *,
        validation: str | None = None,
        validation_fraction: float = 0.0,
        test: str | None = None,
        format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto",
        columns: dict[str, str] | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
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
    ) -> None:
        super().__init__()
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        if validation is not None and validation_fraction:
            raise ValueError("validation_fraction has no effect beside a validation file: set one of them")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if batch_size is None and max_tokens_per_batch is None:
            batch_size = DEFAULT_BATCH_SIZE
        self.train_source = str(train)
        self.validation_source = None if validation is None else str(validation)
        self.test_source = None if test is None else str(test)
        self.validation_fraction = validation_fraction
        self.source_settings = SourceSettings(
            format=format,
            columns=columns,
            max_length=max_length,
            train_on_prompt=train_on_prompt,
            limit=limit,
            on_bad_rows=on_bad_rows,
        )
        self.batch_settings = BatchSettings(
            batch_size=batch_size, max_tokens=max_tokens_per_batch, padded=not packing, shuffle=shuffle, seed=seed
        )
        self.packing = packing
        self.num_workers = num_workers
        self.cache_dir = cache_folder("tokenized") if cache_dir is None else Path(cache_dir).expanduser()
        self.train_data: TokenizedDataset | None = None
        self.validation_data: TokenizedDataset | None = None
        self.test_data: TokenizedDataset | None = None
        self.summary: DataSummary | None = None
        self._tokenizer = tokenizer
        self._tokenizer_name: str | None = None
        self._datasets: dict[str, TokenizedDataset] = {}
        self._train_sampler: ResumableBatchSampler | None = None
        self._loaded_state: dict[str, Any] | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._limit_val_batches: int | float | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use; code that comes with it runs where the module says ``trust_remote_code``.

        Raises:
            ValueError: if none was given and the module does not say which base model it trains.
        """
        if not isinstance(self._tokenizer, PreTrainedTokenizerBase):
            from lit_lora.base.load import load_tokenizer

            name, revision = self._tokenizer, None
            module = self.trainer.lightning_module if self.trainer is not None else None
            if name is None:
                name, revision = getattr(module, "base", None), getattr(module, "revision", None)
            if not isinstance(name, str):
                raise ValueError(
                    "no tokenizer: the module has no attribute 'base' with the model's name; "
                    f"set {setting('data.tokenizer')} to a name, a folder, or 'bytes'"
                )
            self._tokenizer = load_tokenizer(
                name, revision=revision, trust_remote_code=getattr(module, "trust_remote_code", False)
            )
            self._tokenizer_name = name
        return self._tokenizer

    def trained_on(self) -> dict[str, Any]:
        """What the record of an adapter says of this data; plain types."""
        assert self.train_data is not None, "setup() comes before trained_on()"
        format = self.train_data.statistics.format
        return data_record(self.tokenizer, self.source_settings, name=self._tokenizer_name, format=format)

    def settings(self) -> dict[str, Any]:
        """What it was built with, for loggers."""
        tokenizer = self._tokenizer
        return {
            "train": self.train_source,
            "validation": self.validation_source,
            "validation_fraction": self.validation_fraction,
            "test": self.test_source,
            "tokenizer": tokenizer if isinstance(tokenizer, str | None) else tokenizer.name_or_path or str(tokenizer),
            **asdict(self.source_settings),
            **asdict(self.batch_settings),
        }

    def prepare_data(self) -> None:
        """Tokenize every source into the cache, on one process a machine; other runs may be writing there, too."""
        remove_partial_files(self.cache_dir, older_than_s=ABANDONED_S)
        for source in (self.train_source, self.validation_source, self.test_source):
            if source is not None:
                self._tokenized(source)

    def setup(self, stage: str) -> None:
        """Load the tokenized data.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            ValueError: if the Trainer would replace the sampler, or the data cannot be used.
        """
        self._check_trainer()
        self._train_sampler, self._loaded_state = None, None
        train = self._tokenized(self.train_source)
        if self.validation_fraction:
            chosen = split_indices(len(train), self.validation_fraction, self.batch_settings.seed)
            train, self.validation_data = train.select(chosen[0]), train.select(chosen[1])
        elif self.validation_source is not None:
            self.validation_data = self._tokenized(self.validation_source)
        if self.test_source is not None:
            self.test_data = self._tokenized(self.test_source)
        self.train_data = train
        if stage == "fit":
            self._fingerprint = self._take_fingerprint()
            num_validation = 0 if self.validation_data is None else len(self.validation_data)
            self.summary = summarize(train, self.tokenizer, self.batch_settings, num_validation=num_validation)
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
                resume_from = (self._loaded_state["epoch"], self.rank_batches_consumed(self._world_size))
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
            )
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

    def source_lines(self, example_ids: Sequence[int]) -> list[int]:
        """The lines in the source of training examples; negative ids, which are fillers, give -1."""
        assert self.train_data is not None, "setup() comes before source_lines()"
        return [-1 if number < 0 else int(self.train_data.lines[number]) for number in example_ids]

    def predict_dataloader(self) -> DataLoader:
        """Prompts with reference answers, one at a time: ``prompt_ids`` (1, L), ``reference``, ``example_ids`` (1,).

        From the test data, else the validation data, else the training data. Of a conversation the last answer is
        asked for.
        """
        pairs = (
            (self.test_source, self.test_data),
            (self.validation_source or self.train_source, self.validation_data),
            (self.train_source, self.train_data),
        )
        source, data = next((source, data) for source, data in pairs if data is not None)
        assert source is not None
        settings = self._settings_of(source)
        contents = {example.line: example.content for example in read_examples(source, settings).items}
        prompts = prompts_of([contents[line] for line in data.lines.tolist()], self.tokenizer, source)
        share = prompts_of_rank(prompts, self._rank, self._world_size)
        return DataLoader(PromptDataset(share), batch_size=1, collate_fn=only, generator=self._generator())

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

    def rank_batches_consumed(self, world_size: int) -> int:
        """Micro-batches that each of ``world_size`` ranks had consumed in its epoch when the loaded state was saved.

        Raises:
            ValueError: if they cannot be divided among the ranks.
        """
        return 0 if self._loaded_state is None else rank_batches_consumed(self._loaded_state, world_size)

    def fingerprint(self) -> dict[str, Any]:
        """What a position in the data means; plain types.

        ``tokens`` is a digest of what is trained on, as it is in memory; ``order`` all that decides which example comes
        at which place; ``source`` all that made the tokens, to say why they differ; ``validation`` a digest likewise.
        """
        assert self._fingerprint is not None, "setup() comes before fingerprint()"
        return self._fingerprint

    def _take_fingerprint(self) -> dict[str, Any]:
        assert self.train_data is not None
        order = asdict(self.batch_settings)
        order |= {"max_tokens_per_batch": order.pop("max_tokens"), "packing": not order.pop("padded")}
        source = {
            **asdict(self.source_settings),
            "train": self.train_source,
            "validation_fraction": self.validation_fraction,
            "tokenizer": tokenizer_digest(self.tokenizer)[:12],
        }
        validation = None if self.validation_data is None else self.validation_data.digest()
        return {"tokens": self.train_data.digest(), "order": order, "source": source, "validation": validation}

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

    def _check_trainer(self) -> None:
        # Lightning has no public way to ask; with its own sampler in place of ours it fails later and less clearly.
        if self.trainer is None or self._world_size == 1:
            return
        if self.trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                f"the data is divided among the {self._world_size} ranks by SFTDataModule: "
                f"set {setting('trainer.use_distributed_sampler', False)} for the Trainer"
            )

    def _settings_of(self, source: str) -> SourceSettings:
        return self.source_settings if source == self.train_source else replace(self.source_settings, limit=None)

    def _tokenized(self, source: str) -> TokenizedDataset:
        if source not in self._datasets:
            settings = self._settings_of(source)
            self._datasets[source] = tokenize_source(source, self.tokenizer, settings, cache_dir=self.cache_dir)
        return self._datasets[source]

    def _num_batches(self, data: TokenizedDataset | None) -> int:
        """Of this rank, in an epoch."""
        return 0 if data is None else -(-len(plan_batches(data.lengths, self.batch_settings)) // self._world_size)

    def _evaluation_loader(self, data: TokenizedDataset) -> DataLoader:
        settings = replace(self.batch_settings, shuffle=False)
        sampler = ResumableBatchSampler(data.lengths, settings, rank=self._rank, world_size=self._world_size)
        return self._loader(data, sampler)

    def _loader(self, data: TokenizedDataset, sampler: ResumableBatchSampler) -> DataLoader:
        self._check_vocabulary(data)
        return ResumableDataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=collate_packed if self.packing else collate_padded,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # From memory of its own a copy to the GPU need not wait for what the GPU is at.
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            generator=self._generator(),
        )

    def _generator(self) -> torch.Generator:
        """A DataLoader draws from a generator for every iterator; the global one would differ after a resume."""
        return torch.Generator().manual_seed(self.batch_settings.seed)

    def _check_vocabulary(self, data: TokenizedDataset) -> None:
        module = None if self.trainer is None else self.trainer.lightning_module
        model = getattr(module, "model", None)
        if isinstance(model, PreTrainedModel):
            check_vocabulary(data, model.config.get_text_config().vocab_size)
