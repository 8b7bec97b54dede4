"""What tests of several folders share: the real model and real text, each skipped with a reason where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.tools.fetch import model_folder

REAL_MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def real_model() -> str:
    """Name of the fetched SmolLM2-135M-Instruct."""
    if not (model_folder(REAL_MODEL) / "config.json").is_file():
        pytest.skip(f"run `lit-lora fetch {REAL_MODEL}` first")
    return REAL_MODEL


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """Grade-school maths problems: real text of natural lengths, kept beside the repository."""
    path = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip(f"no GSM8K at {path}")
    return path
