"""Where a run starts: the checkpoint that it goes on from, and the folder that it claims for itself.

The first process chooses, and tells those that it starts by environment variables, which are gone when the run ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_lora.data.datamodule import SFTDataModule
from lit_lora.files.checkpoint import read_checkpoint
from lit_lora.files.environment import CHECKPOINT_VARIABLE, RUN_FOLDER_VARIABLE
from lit_lora.report.outcome import read_outcome
from lit_lora.runs.run_folder import RunFolder, find_checkpoint, new_run_folder, resumed_run_folder, run_folders
from lit_lora.wording import setting


class Start(NamedTuple):
    """Where a run starts."""

    folder: str
    checkpoint: str | None
    claimed: RunFolder | None
    """To be released when the run ends; None in processes that the first one has started, and where nothing trains."""


@contextmanager
def one_run() -> Iterator[None]:
    """Within, this process takes part in one run; afterwards its variables and its process group are gone."""
    inherited = {name: os.environ.get(name) for name in (RUN_FOLDER_VARIABLE, CHECKPOINT_VARIABLE)}
    try:
        yield
    finally:
        for name, value in inherited.items():
            if value is None:
                os.environ.pop(name, None)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Lightning does so for NCCL only. At the interpreter's end gloo's threads now and then abort the process.
            torch.distributed.destroy_process_group()


def choose_start(
    root: str | Path,
    ckpt_path: str | None,
    ends: Mapping[str, int | None],
    *,
    verb: str = "fit",
    dirpath: str | None = None,
    trial: bool = False,
) -> Start:
    """Find the checkpoint, choose the folder and claim it.

    Args:
        root: ``default_root_dir``.
        ckpt_path: a file, a folder of them, or "last"; None for a new run.
        ends: ``max_steps`` and ``max_epochs``.
        verb: only "fit" claims a folder.
        dirpath: where checkpoints go, if not into ``checkpoints`` in the run's folder.
        trial: whether it is a trial run, which writes nothing.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be gone on from.
    """
    if RUN_FOLDER_VARIABLE in os.environ:  # the first process of this run has chosen
        return Start(os.environ[RUN_FOLDER_VARIABLE], os.environ[CHECKPOINT_VARIABLE] or None, None)
    found = find_checkpoint(ckpt_path, root, dirpath) if ckpt_path else None
    for problem in found.skipped if found is not None else []:
        rank_zero_warn(f"Skipped: {problem}")
    if ckpt_path and found is None and verb != "fit":
        raise FileNotFoundError(
            f"no checkpoint in {' or '.join(map(str, run_folders(root)))}: give the file, or leave out "
            f"--ckpt_path to {verb} the base with untrained adapters"
        )
    if found is not None:
        rank_zero_info(f"Going on from {found.checkpoint}")
    elif ckpt_path:
        rank_zero_info(f"No checkpoint in {root}: a new run starts")
    if verb == "fit" and found is not None and found.folder is not None:
        _refuse_older(found.checkpoint, found.folder, ends)
    folder, claimed = str(root), None
    if verb == "fit" and not trial and _is_first_process():
        claimed = _claim(root, found.folder if found is not None else None)
        folder = str(claimed.path)
    checkpoint = str(found.checkpoint) if found is not None else None
    os.environ[CHECKPOINT_VARIABLE] = checkpoint or ""
    os.environ[RUN_FOLDER_VARIABLE] = folder
    return Start(folder, checkpoint, claimed)


def _claim(root: str | Path, resumed: Path | None) -> RunFolder:
    claimed = new_run_folder(root) if resumed is None else resumed_run_folder(resumed)
    if resumed is None and claimed.path != Path(root):
        rank_zero_info(f"{root} holds another run: this one goes to {claimed.path}")
    return claimed


def _refuse_older(checkpoint: Path, folder: Path, ends: Mapping[str, Any]) -> None:
    """Refuse to end a finished run again, at an older step: its results would be replaced by earlier ones."""
    outcome = read_outcome(folder)
    if outcome is None or not outcome.finished:
        return
    content = read_checkpoint(checkpoint)
    step: int = content["global_step"]
    epochs: int = content.get(SFTDataModule.__name__, content)["epoch"]  # the data's count is the one that is gone by
    if step >= outcome.step:
        return
    for name, reached in (("max_steps", step), ("max_epochs", epochs)):
        end = ends.get(name)
        if end is not None and 0 <= end <= reached:
            raise ValueError(
                f"the run in {folder} finished at step {outcome.step}, {checkpoint} is of step {step}, and "
                f"{setting(f'trainer.{name}')} {end} leaves nothing to train: `lit-lora export {checkpoint} FOLDER` "
                "writes its adapter"
            )


def _is_first_process() -> bool:
    """Whether this is the process that chooses for all, told by what launchers set: there is no group to ask yet."""
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"  # public, set outside of the function
