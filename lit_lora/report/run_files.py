"""What lies in the folder of a run, read for its report: also of a run that is going on, has failed or was killed.

What is not there, or cannot be read, is None or empty here, and a line of :attr:`RunFiles.missing`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lit_lora.files import strict_yaml
from lit_lora.metrics import FILE_NAME, TrainingMetrics
from lit_lora.report.adapter_sizes import LayerUpdate, layer_updates
from lit_lora.report.circumstances import CIRCUMSTANCES, read_circumstances
from lit_lora.report.outcome import Outcome, read_outcome

ADAPTER, CONFIG, EVALUATION, FORGETTING = "adapter", "config.yaml", "evaluation.json", "forgetting.json"
_MOST_BYTES = 64 << 20
"""Of a file that a page is made from: what lies there under its name may be something else."""

_GRADIENT, _MEMORY = "grad_norm/", ("memory/", "_peak_mib")
_NO_LAYER = {"total", "A", "B", "loss_scale", "non_finite_steps", "loss_spikes", "explosions"}

_Read = TypeVar("_Read")


@dataclass
class RunFiles:
    """A run, as its folder tells it."""

    folder: Path
    metrics: TrainingMetrics = field(default_factory=TrainingMetrics)
    outcome: Outcome | None = None
    """None before the end of a run, or where it was killed."""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    gradients: dict[str, dict[int, float]] = field(default_factory=dict)
    """Layer -> step -> norm of its gradient, on the steps that were logged."""
    memory_mib: dict[str, float] = field(default_factory=dict)
    """Phase -> highest of the logged steps."""
    updates: list[LayerUpdate] = field(default_factory=list)
    """What the exported adapter adds to each layer."""
    circumstances: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Scores, and answers before and after, where ``lit-lora evaluate --output RUN/evaluation.json`` has written them:
    of each adapter by its name, which is empty where there is one."""
    forgetting: dict[str, float] = field(default_factory=dict)
    """The last measurement on a general sample, where the run was given one."""
    missing: list[str] = field(default_factory=list)
    """What the page cannot show, and why."""

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def budget_mib(self) -> float | None:
        """The budget that the run was given for its memory."""
        value = _inside(self.config, "memory", "budget_mib")
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_run(folder: str | Path) -> RunFiles:
    """Read the folder of a run.

    Raises:
        ValueError: if it is none: it holds neither metrics nor a config.
    """
    run = RunFiles(Path(folder))
    if not (run.folder / FILE_NAME).is_file() and not (run.folder / CONFIG).is_file():
        what = "no such folder" if not run.folder.is_dir() else f"it holds neither {FILE_NAME} nor {CONFIG}"
        raise ValueError(f"{folder} is not the folder of a run: {what}; expected one that lit-lora fit has made")
    run.metrics = _read(run, FILE_NAME, lambda path: TrainingMetrics.from_jsonl(_text(path))) or run.metrics
    run.outcome = read_outcome(run.folder)
    run.config_text = _read(run, CONFIG, _text) or ""
    run.config = _read(run, CONFIG, _mapping) or {}
    run.circumstances = _read(run, CIRCUMSTANCES, read_circumstances) or {}
    run.evaluations = _read(run, EVALUATION, _evaluations, wanted=False) or {}
    run.forgetting = _read(run, FORGETTING, _last_shift, wanted=False) or {}
    run.updates = _read(run, ADAPTER, layer_updates) or []
    _read_log(run)
    return run


def _read(run: RunFiles, name: str, read: Callable[[Path], _Read], *, wanted: bool = True) -> _Read | None:
    path = run.folder / name
    if not path.exists():
        run.missing += [f"{name}: not there"] if wanted else []
        return None
    try:
        return read(path)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        run.missing.append(f"{name}: {' '.join(str(error).split())[:300]}")
        return None


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"expected a file of at most {_MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def _mapping(path: Path) -> dict[str, Any]:
    content = strict_yaml.read(path)
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping, got {type(content).__name__}")
    return content


def _evaluations(path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads(_text(path))
    found = content["adapters"] if isinstance(content, dict) and "adapters" in content else {"": content}
    for entry in found.values():
        answers = [entry[name] for name in ("expected", "before", "after") if name in entry]
        if len(answers) not in (0, 3) or not all(isinstance(t, str) for texts in answers for t in texts):
            raise ValueError("expected answers as lit-lora evaluate --output writes them")
        for score in entry.get("scores", {}).values():
            numbers = [score[side][name] for side in ("before", "after") for name in ("value", "low", "high")]
            if not all(isinstance(number, int | float) for number in numbers) or not isinstance(score["finding"], str):
                raise ValueError("expected scores as lit-lora evaluate --output writes them")
    return dict(found)


def _last_shift(path: Path) -> dict[str, float]:
    history = json.loads(_text(path))["history"]
    return {name: float(history[-1][name]) for name in ("base_loss", "loss", "kl")} if history else {}


def _read_log(run: RunFiles) -> None:
    """Norms by layer and memory by phase, from the log that Lightning's CSV logger keeps; a resumed run has several."""
    logs = sorted(run.folder.glob("logs/version_*/metrics.csv"), key=lambda path: _number(path.parent.name))
    for path in logs:
        for row in _read(run, str(path.relative_to(run.folder)), _rows) or []:
            step = _value(row.get("step"))
            for name, text in row.items():
                value = _value(text)
                if value is None or step is None or name is None:
                    continue
                layer = name.removeprefix(_GRADIENT)
                if name.startswith(_GRADIENT) and layer not in _NO_LAYER:
                    run.gradients.setdefault(layer, {})[int(step) + 1] = value
                elif name.startswith(_MEMORY[0]) and name.endswith(_MEMORY[1]) and name != "".join(_MEMORY):
                    phase = name[len(_MEMORY[0]) : -len(_MEMORY[1])]
                    run.memory_mib[phase] = max(value, run.memory_mib.get(phase, 0.0))
    if not run.gradients:
        run.missing.append("gradients and memory over time: logs/ holds none; they are logged every "
                           "trainer.log_every_n_steps")  # fmt: skip


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_text(path).splitlines()))


def _value(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _number(name: str) -> int:
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _inside(content: Any, *names: str) -> Any:
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    return content
