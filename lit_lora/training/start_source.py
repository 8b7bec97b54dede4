"""What a run's adapters start from, where that is more than the layers: its first batches, or the base unquantized."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_lora.adapters.later_starts import StartFrom
from lit_lora.base import base_weight
from lit_lora.base.load import RANDOM, load_base_model
from lit_lora.config import LATER_STARTS, LoRAConfig, QuantizationConfig
from lit_lora.data.batches.packing import collate_padded
from lit_lora.data.batches.sampler import plan_batches
from lit_lora.data.datamodule import SFTDataModule
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.files.environment import CHECKPOINT_VARIABLE
from lit_lora.training.training_state import KEY
from lit_lora.wording import setting

NUM_BATCHES = 16
"""Micro-batches of the first epoch, in the order of training."""


def check_start(lora: LoRAConfig, quantization: QuantizationConfig | None) -> None:
    """Refuse adapters that cannot be trained, or start as the base cannot have them, before it is loaded.

    Raises:
        ValueError: naming the setting.
    """
    lora.check_for_training()
    if lora.init_lora_weights == "loftq" and quantization is None:
        raise ValueError(
            f"{setting('model.lora.init_lora_weights', 'loftq')} makes up for what quantization takes, and the base is "
            f"not quantized: set {setting('model.quantization.bits', 4)}, or leave it out"
        )


def start_source(lora: LoRAConfig, trainer: Any, base: str, how_to_load: Mapping[str, Any]) -> StartFrom | None:
    """What the adapters of a run start from.

    Args:
        lora: says how they start.
        trainer: of the run; None, or one that resumes or only evaluates, brings the adapters from a checkpoint.
        base: as it was loaded.
        how_to_load: the other arguments that it was loaded with.

    Raises:
        ValueError: if the run has no batches to take.
    """
    start = lora.init_lora_weights
    if start not in LATER_STARTS:
        return None
    if trainer is None or trainer.state.fn != "fit" or checkpoint_to_load(trainer) is not None:
        return ()
    if start == "loftq":
        return _unquantized(base, {**how_to_load, "quantization": None})
    data = trainer.datamodule
    if not isinstance(data, SFTDataModule):
        given = "a loader" if data is None else type(data).__name__
        raise ValueError(
            f"{setting('model.lora.init_lora_weights', start)} takes batches of an SFTDataModule, and the data is "
            f"{given}: save an adapter that inject_lora made with start_from, and train from it with "
            f"{setting('model.adapter')}"
        )
    batches = first_batches(data)
    rank_zero_info(f"Start {start!r}: from the first {len(batches)} batches")
    return batches


def resumed_ranks(lora: LoRAConfig, trainer: Any) -> LoRAConfig:
    """With the ranks that the data of the run chose, where a checkpoint of it is loaded.

    Where the settings that they follow from are others now, they are left to be refused. Lightning's own
    ``Trainer.fit(ckpt_path=...)`` says too late which checkpoint it loads: there they are chosen again.
    """
    path = None if trainer is None else checkpoint_to_load(trainer)
    if lora.eva_rho == 1 or path is None:
        return lora
    saved = read_checkpoint(path).get(KEY, {}).get("settings", {}).get("lora", {})
    if any(saved.get(name) != getattr(lora, name) for name in ("r", "lora_alpha", "eva_rho", "init_lora_weights")):
        return lora
    return replace(lora, **{name: saved[name] for name in ("target_modules", "rank_pattern", "alpha_pattern")})


def checkpoint_to_load(trainer: Any) -> Any:
    """What is going to be loaded, where it is known; None otherwise."""
    return os.environ.get(CHECKPOINT_VARIABLE) or trainer.ckpt_path


def first_batches(data: SFTDataModule, number: int = NUM_BATCHES) -> list[dict[str, Tensor]]:
    """The first batches of training on one process, padded, as a model of transformers takes them.

    They follow from the data and its seed, and nothing is drawn or moved on.
    """
    assert data.train_data is not None, "setup() comes before"
    examples = data.train_data
    plan = plan_batches(examples.lengths, data.batch_settings, mixture=data.mixture)
    made = []
    for chosen in plan[:number]:
        batch = collate_padded([examples[index] for index in chosen])
        labels = torch.full_like(batch["input_ids"], -100)
        labels.view(-1)[batch["target_positions"] + 1] = batch["target_ids"]
        made.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return made


def _unquantized(base: str, how_to_load: dict[str, Any]) -> Callable[[str], Tensor]:
    """A layer's weight as it is stored. The base is loaded a second time, into main memory, when the first is asked."""
    device = None if base.startswith(RANDOM) else "cpu"  # random weights are those of a device
    loaded: list[Any] = []

    def read(name: str) -> Tensor:
        if not loaded:
            loaded.append(load_base_model(base, device=device, **how_to_load))
        return base_weight.read_weight(loaded[0].get_submodule(name))

    return read
