"""The metrics of a run over its stops: in memory, in a file of its folder, and what a checkpoint says of them.

The history is in the file, and a checkpoint holds how far that had come, so that it does not grow with the run. What is
not in the file yet, because there is none (a Trainer of one's own) or the disk was full, is in the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_lora.files.append_log import AppendLog, Mark, read_to_mark, with_set_aside
from lit_lora.metrics import FILE_NAME, TrainingMetrics


class MetricsRecord:
    """What was measured so far, and how much of that is in a file."""

    def __init__(self) -> None:
        self.metrics = TrainingMetrics()
        self.failure: str | None = None
        """Why the newest metrics are not on disk; None if they are, or no file was asked for."""
        self._log: AppendLog | None = None
        self._saved = (0, 0)
        """How many steps and validations are in the file."""

    def keep_in(self, folder: Path | None) -> None:
        """Write into ``metrics.jsonl`` of this folder from the next :meth:`save` on; None for no file."""
        self._log = None if folder is None else AppendLog(folder / FILE_NAME)
        self._saved = (0, 0)
        self.failure = None

    def save(self) -> None:
        """Bring the file up to the metrics; a failed write is a warning, the first of several in a row."""
        if self._log is None or not self.metrics.steps:
            return
        try:
            if self._log.is_whole:
                self._log.append(self._unsaved().encode())
            else:
                self._log.begin(self.metrics.to_jsonl().encode())
        except OSError as error:
            if self.failure is None:
                rank_zero_warn(
                    f"The record of the last steps was not written: {error}. Training goes on and tries again at the "
                    "next save."
                )
            self.failure = str(error)
        else:
            self._saved = (len(self.metrics.steps), len(self.metrics.validation))
            self.failure = None

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: how far the file has come, and what is not in it."""
        self.save()
        if self._log is None or not self._log.is_whole:
            return {**Mark(0, "")._asdict(), "folder": "", "unsaved": self.metrics.to_jsonl()}
        folder = self._log.path.parent.resolve()
        return {**self._log.mark._asdict(), "folder": str(folder), "unsaved": self._unsaved()}

    def load_state_dict(self, state: Mapping[str, Any], folders: Sequence[Path]) -> None:
        """Go on from what a checkpoint says. Nothing is written before the next :meth:`save`.

        Without the file the run goes on without its earlier part, which is said.

        Args:
            state: from :meth:`state_dict`.
            folders: where the file may be, beside the folder in which it was.

        Raises:
            ValueError: for a file that is not as it was, or a state that is none.
        """
        kinds = {"num_bytes": int, "sha256": str, "folder": str, "unsaved": str}
        wrong = [name for name, kind in kinds.items() if type(state.get(name)) is not kind]
        if wrong or state["num_bytes"] < 0:
            what = ", ".join(wrong) or "a length"
            raise ValueError(f"the checkpoint's record lacks {what}: it is not as lit_lora writes it")
        places = [*folders, *([Path(state["folder"])] if state["folder"] else [])]
        files = [file for place in places for file in with_set_aside(place / FILE_NAME)]
        try:
            content = read_to_mark(files, Mark(state["num_bytes"], state["sha256"]))
        except ValueError as error:
            raise ValueError(
                f"the record of the run is not the one that the checkpoint was saved with: {error}. Restore the file, "
                f"or move it out of the folder to go on without the metrics of the earlier steps; such a run is not "
                "judged as proved"
            ) from error
        if content is None:
            rank_zero_warn(
                f"The record of the run, {FILE_NAME}, is not in {' or '.join(dict.fromkeys(map(str, places)))}: it "
                "goes on without the metrics of the earlier steps, and will not be judged as proved. Put the file "
                "there and resume again to have them"
            )
        self.metrics = TrainingMetrics.from_jsonl((content or b"").decode() + state["unsaved"])
        self._saved = (0, 0)

    def _unsaved(self) -> str:
        return self.metrics.to_jsonl(after_steps=self._saved[0], after_validations=self._saved[1])
