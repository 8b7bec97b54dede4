"""A quiet Trainer for the callbacks' tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from plain_projects import MemoryLogger


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **overrides: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "logger": False,
            "max_steps": 8,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        return pl.Trainer(callbacks=list(callbacks), **{**settings, **overrides})

    return make


@pytest.fixture
def logger() -> MemoryLogger:
    return MemoryLogger()
