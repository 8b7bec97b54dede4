"""What a DataLoader of ours is made of, beside its sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, Dataset


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


class PromptDataset(Dataset):
    """Prompts to answer, with the reference answers."""

    def __init__(self, prompts: list[dict[str, Any]]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.prompts[index]


def only(batch: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The single example of a batch."""
    return batch[0]
