"""What a DataLoader of ours is made of, beside its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.chats.formats import Example
from lit_lora.data.chats.tokenize import format_prompt, last_answer
from lit_lora.data.prepared.dataset import Examples, check_vocabulary


class ResumableDataLoader(DataLoader):
    """A DataLoader over :class:`ResumableBatchSampler`.

    It answers Lightning's question whether it can resume; the position itself is kept by the data module, for all
    workers.
    """

    def state_dict(self) -> dict[str, Any]:
        """Empty: see :meth:`SFTDataModule.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: see :meth:`SFTDataModule.load_state_dict`."""


def batch_loader(
    data: Examples, sampler: Sampler[list[int]], trainer: Any, *, packed: bool, num_workers: int, seed: int
) -> DataLoader:
    """A loader of micro-batches.

    Args:
        data: what the sampler's numbers mean.
        sampler: gives the batches.
        trainer: that will take them, if it is known.
        packed: put the examples of a batch one after the other instead of padding them.
        num_workers: processes that assemble batches.
        seed: of the loader's random state.

    Raises:
        ValueError: if the model that is trained does not know a token.
    """
    model = getattr(None if trainer is None else trainer.lightning_module, "model", None)
    if isinstance(model, PreTrainedModel):
        check_vocabulary(data, model.config.get_text_config().vocab_size)
    return ResumableDataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=collate_packed if packed else collate_padded,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        # From memory of its own a copy to the GPU need not wait for what the GPU is at.
        pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        generator=generator_of(seed),
    )


def generator_of(seed: int) -> torch.Generator:
    """A DataLoader draws from a generator for every iterator; the global one would differ after a resume."""
    return torch.Generator().manual_seed(seed)


PROMPTS_A_BATCH = 100
"""Prompts that are answered together: many, since a batch is kept full only while others of it wait."""


class PromptDataset(Dataset):
    """Prompts to answer, with the reference answers."""

    def __init__(self, prompts: list[dict[str, Any]]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.prompts[index]


def prompt_loader(prompts: list[dict[str, Any]], seed: int) -> DataLoader:
    """Lists of :data:`PROMPTS_A_BATCH` prompts, in order."""
    dataset, generator = PromptDataset(prompts), generator_of(seed)
    return DataLoader(dataset, batch_size=PROMPTS_A_BATCH, collate_fn=list, generator=generator)


def prompts_of(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, source: str, date: str | None
) -> list[dict[str, Any]]:
    """What :class:`PromptDataset` holds: of each conversation the last answer is asked for, as a model writes it.

    Args:
        examples: conversations.
        tokenizer: with the layout of prompts.
        source: where they are from, for the error.
        date: what a chat template that writes the date is told.

    Raises:
        ValueError: for plain text.
    """
    prompts = []
    for index, example in enumerate(examples):
        content = example.content
        if isinstance(content, str):
            raise ValueError(f"{source} holds plain text, which has no prompts to answer: use a format with prompts")
        last = max(number for number, turn in enumerate(content) if turn["role"] == "assistant")
        ids = torch.tensor([format_prompt(tokenizer, content[:last], example.tools, example.options, date=date)])
        reference = last_answer(tokenizer, example._replace(content=content[: last + 1]))
        prompts.append({"prompt_ids": ids, "reference": reference, "example_ids": torch.tensor([index])})
    return prompts


def prompts_of_rank(prompts: list[dict[str, Any]], rank: int, world_size: int) -> list[dict[str, Any]]:
    """One rank's share: equally many for every rank, a missing one as a filler whose answer is dropped.

    A base that is divided among ranks runs in all of them at once, or in none.
    """
    share = prompts[rank::world_size]
    return share if len(share) == -(-len(prompts) // world_size) else [*share, {**prompts[0], "filler": True}]
