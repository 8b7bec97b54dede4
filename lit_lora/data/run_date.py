"""The date of a run, for chat templates that write one: taken once, and kept in its checkpoints."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_lora.data.batches.resume import positions_in
from lit_lora.data.chats.stopped_clock import CLOCK
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.files.environment import CHECKPOINT_VARIABLE


def date_of_run(given: str | None, tokenizer: PreTrainedTokenizerBase, trainer: Any) -> str | None:
    """What a chat template that asks for the time is told, on all ranks alike; None where it does not ask.

    Args:
        given: the setting: it goes first.
        tokenizer: with the template.
        trainer: of several processes, the first decides.

    Where a checkpoint is loaded, its date comes before today's. Lightning's own ``Trainer.fit(ckpt_path=...)`` says too
    late which one it loads: there the data of another day are refused, by the name of the setting.
    """
    if given is not None or CLOCK not in str(tokenizer.chat_template):
        return given
    today = datetime.date.today().isoformat()
    if trainer is None:
        return today
    found = _recorded(os.environ.get(CHECKPOINT_VARIABLE) or trainer.ckpt_path) or today
    return str(trainer.strategy.broadcast(found))


def _recorded(checkpoint: Any) -> str | None:
    """That of the run that a checkpoint is of."""
    if not checkpoint or not Path(checkpoint).is_file():
        return None
    positions = positions_in(read_checkpoint(checkpoint)).values()
    dates = [position["fingerprint"]["source"].get("template_date") for position in positions]
    return next((date for date in dates if date is not None), None)
