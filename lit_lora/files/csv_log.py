"""Lightning's CSV log, for a disk that may be full for a while.

Lightning's own writer lets an OSError end the run, empties the file before it writes a longer header, and after a
failure leaves half a row or a header that lacks columns. Here a failed write leaves the file as it was and keeps its
rows for the next save.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_lora.files.atomic import atomic_write, make_folder


class PatientCSVLogger(CSVLogger):
    """A CSVLogger whose failed writes are warnings, tried again at the next save."""

    failure: str | None = None
    """Why the newest rows are not on disk; None if they are."""
    _has_folder = False
    _settings: Mapping[str, Any] = MappingProxyType({})
    """Those of the run, and what else was told of it."""
    _settings_are_written = True

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer. Asked for before any callback, so it is what finds a folder that cannot be written to."""
        if not self._has_folder:
            make_folder(self.save_dir, option="trainer.default_root_dir")
            self._has_folder = True
        return super().experiment

    @rank_zero_only
    def log_hyperparams(self, params: Any = None) -> None:
        """Keep them for ``hparams.yaml``, which comes with the first rows: a run that takes no step writes nothing."""
        self._settings = {**self._settings, **(params or {})}
        self._settings_are_written = False

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are not in the file yet."""
        try:
            writer = self.experiment
            if writer.metrics:
                folder = Path(self.log_dir)
                folder.mkdir(parents=True, exist_ok=True)
                if not self._settings_are_written:
                    text = yaml.safe_dump(dict(self._settings), sort_keys=False)
                    atomic_write(folder / writer.NAME_HPARAMS_FILE, lambda file: file.write(text.encode()))
                    self._settings_are_written = True
                _add_rows(Path(writer.metrics_file_path), writer.metrics)
                writer.metrics = []
        except OSError as error:
            if self.failure is None:
                rank_zero_warn(f"The CSV log was not written: {error}. Training goes on and tries again.")
            self.failure = str(error)
        else:
            self.failure = None


def _add_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append; or replace the file where the rows have columns that it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known: list[str] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            known = next(csv.reader(file), [])
    columns = sorted(set(known).union(*rows))
    if columns != known:
        earlier: list[dict[str, str]] = []
        if known:
            with path.open(newline="", encoding="utf-8") as file:
                earlier = list(csv.DictReader(file))
        data = _text(columns, [*earlier, *rows], header=True).encode()
        atomic_write(path, lambda file: file.write(data))
        return
    size = path.stat().st_size
    try:
        with path.open("ab") as log:
            log.write(_text(columns, rows, header=False).encode())
    except OSError:
        os.truncate(path, size)
        raise


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], *, header: bool) -> str:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()
