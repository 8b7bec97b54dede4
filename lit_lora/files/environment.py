"""The environment variables that lit_lora reads. Settings are not among them: a command line says what a run does.

jsonargparse could take every option from the environment, too (``LIT_LORA_FIT__DATA__TRAIN``). That is left out: a run
would depend on what some shell profile exports, and its command would not repeat it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lit_lora.files.meant import closest, did_you_mean

PREFIX = "LIT_LORA_"

VARIABLES = {
    "LIT_LORA_HOME": "folder for models that `lit-lora fetch` downloads; ~/.cache/lit_lora",
    "LIT_LORA_CACHE": "folder for tokenized data and hashes of models; ~/.cache/lit_lora",
    "LIT_LORA_TRACEBACK": "1 for Python's traceback after an error",
}
"""What a user can set, and what it does."""

RUN_FOLDER_VARIABLE = "LIT_LORA_RUN_FOLDER"
"""Tells the processes that a distributed run starts which folder the first one chose."""

CHECKPOINT_VARIABLE = "LIT_LORA_CKPT_PATH"
"""Likewise, which checkpoint to go on from; empty for none. Set while the run lasts."""

_INTERNAL = (RUN_FOLDER_VARIABLE, CHECKPOINT_VARIABLE)


ALLOCATION_VARIABLES = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
    "LRU_CACHE_CAPACITY": "256",
}
"""Read by torch, oneDNN and torch's wrapper of it, at their first allocation or product.

Huge pages: without, a CPU spends a fifth of a step on page faults. The kernels that oneDNN makes for each new shape
take half a MB, and batches of natural lengths bring thirty new shapes a step: with 1024 kept, as by default, and twice,
memory grows by several hundred MB over the first hundreds of steps. A step needs about 30; of 4096 tokens, 116.

CUDA memory in segments that grow: batches of natural lengths leave holes that the next does not fit into. Not where the
older name of the variable says something.
"""
if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    ALLOCATION_VARIABLES["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def cache_folder(name: str) -> Path:
    """A folder of the cache, which need not be there."""
    return Path(os.environ.get("LIT_LORA_CACHE") or "~/.cache/lit_lora").expanduser() / name


def warn_of_unknown_variables() -> None:
    """Name each ``LIT_LORA_`` variable without a meaning: no error, since a container platform may set such names."""
    for name in sorted(os.environ):
        if not name.startswith(PREFIX) or name in VARIABLES or name in _INTERNAL:
            continue
        hint = (
            did_you_mean(closest(name, VARIABLES, cutoff=0.8))
            or "settings are given on the command line or in a config file"
        )
        print(f"lit-lora: the environment variable {name} has no effect: {hint}", file=sys.stderr)
