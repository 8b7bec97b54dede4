"""``config.yaml`` in the folder of a run: the settings, and that a run has taken the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_lora.callbacks._support.trainer import writes_files
from lit_lora.files import strict_yaml
from lit_lora.files.atomic import atomic_write, make_folder
from lit_lora.runs.run_folder import CONFIG_NAME


class ConfigFile(Callback):
    """Writes the settings once data and checkpoint are accepted; those of an earlier part of the run stay beside them.

    A new run has nothing more to be refused for when its fit starts. A resumed one does until its training starts: the
    state of the optimizer is loaded late.
    """

    def __init__(self, settings: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self._settings = settings

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write those of a new run: before its first validation, which may take minutes."""
        if trainer.ckpt_path is None:
            self.write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write those of a resumed run."""
        self.write(trainer)

    def differs(self, folder: str | Path) -> bool:
        """Whether what a folder holds are other settings than these, but for where the run goes on from."""
        try:
            written = strict_yaml.read(Path(folder) / CONFIG_NAME)
        except (OSError, ValueError):
            return True
        return not isinstance(written, dict) or {**written, "ckpt_path": None} != {
            **self._settings(),
            "ckpt_path": None,
        }

    def write(self, trainer: Trainer) -> None:
        """Write the settings where they are not there yet."""
        folder = Path(trainer.default_root_dir)
        if not writes_files(trainer) or not self.differs(folder):
            return
        make_folder(folder, option="trainer.default_root_dir")
        path = folder / CONFIG_NAME
        if path.exists():
            earlier = len(list(folder.glob("config.*.yaml"))) + 1
            path.rename(folder / f"config.{earlier}.yaml")
        text = strict_yaml.dump(self._settings())
        atomic_write(path, lambda file: file.write(text.encode()))
