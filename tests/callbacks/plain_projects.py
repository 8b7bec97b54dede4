"""Small LightningModules that have never heard of lit_lora, and a logger that keeps what it is given."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader


class MemoryLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": float(step or 0)})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]


class PlainModel(BoringModel):
    """BoringModel without warnings: one linear layer, trained in full."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.log("val_loss", self.step(batch), batch_size=4)

    def train_dataloader(self) -> DataLoader:
        torch.manual_seed(0)
        return DataLoader(RandomDataset(32, 64), batch_size=16)


class Block(nn.Module):
    """A frozen linear layer with a low-rank adapter, written without lit_lora."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(32, 32).requires_grad_(False)
        self.lora_A = nn.Linear(32, 4, bias=False)
        self.lora_B = nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class AdapterModel(PlainModel):
    """Two frozen blocks with adapters, batches as dicts with ids; the target is learnable."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        del self.layer
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.register_buffer("scale", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x * self.scale

    def configure_optimizers(self) -> torch.optim.Optimizer:  # type: ignore[override]
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    def step(self, batch: dict[str, Any]) -> Tensor:
        return nn.functional.mse_loss(self(batch["x"]), torch.ones_like(batch["x"]))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DictDataset(64), batch_size=4, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(DictDataset(8), batch_size=4, collate_fn=collate)


class DictDataset(RandomDataset):
    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.len = length
        self.data = 0.5 + 0.1 * torch.randn(length, 32, generator=generator)

    def __getitem__(self, index: int) -> Any:
        return index, self.data[index]


def collate(rows: list[tuple[int, Tensor]]) -> dict[str, Any]:
    ids = [index for index, _ in rows]
    return {
        "x": torch.stack([x for _, x in rows]),
        "example_ids": torch.tensor(ids),
        "num_tokens": 32 * len(rows),
        "target_positions": torch.arange(8 * len(rows)),
    }
