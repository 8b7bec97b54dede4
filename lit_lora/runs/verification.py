"""Whether a run is what its folder says: files as they were left, metrics and adapter of one piece, steps repeated.

What is in a folder can be made up as a whole, sums and all. Training can not: a few steps are taken again, from places
chosen at random, and give the recorded losses, norms and weights, or they do not.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora.files.append_log import Mark, read_to_mark, with_set_aside
from lit_lora.files.checkpoint import DamagedCheckpointError, read_checkpoint
from lit_lora.interchange.peft_folder import PREFIX, WEIGHTS_NAME, read_tensors
from lit_lora.metrics import FILE_NAME, StepMetrics, TrainingMetrics
from lit_lora.report.circumstances import CIRCUMSTANCES, circumstances, read_circumstances
from lit_lora.report.outcome import read_outcome
from lit_lora.runs import sha256sums
from lit_lora.runs.run_folder import CONFIG_NAME
from lit_lora.training import training_state
from lit_lora.training.base_dtype import kept_dtype

REPEATED = ("loss", "grad_norm", "param_norm", "learning_rate", "loss_scale", "num_tokens", "num_target_tokens")
"""Of a step: all but the time that it took."""

TOLERANCE = 0.02
"""Relative, of losses and norms on another kind of machine: sums in another order, in bfloat16 too, drift apart."""

SAME_MACHINE = ("processor", "device", "num_threads", "packages", "num_processes")

Replay = Callable[[Path, Path | None, Path, int, int], None]
"""Takes (config, checkpoint, folder, until, number of processes): trains in ``folder``, from the checkpoint or from the
start, until that step."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    passed: bool | None
    """None where there was nothing to look at."""
    detail: str

    def __str__(self) -> str:
        mark = {True: "", False: "FAILED: ", None: "not judged: "}[self.passed]
        return f"  {self.name:<16}{mark}{self.detail}"


@dataclass
class Verification:
    """What was looked at."""

    findings: list[Finding] = field(default_factory=list)

    @property
    def result(self) -> str:
        """ "verified" where steps were repeated and nothing failed."""
        if any(finding.passed is False for finding in self.findings):
            return "not verified"
        repeated = any(finding.passed for finding in self.findings if finding.name.startswith("steps"))
        return "verified" if repeated else "not judged"

    def __str__(self) -> str:
        headline = self.result if self.result == "verified" else self.result.upper()
        return "\n".join([f"lit_lora: {headline}", *map(str, self.findings)])


def verify(folder: Path, replay: Replay, *, num_steps: int = 10, num_places: int = 2, seed: int | None = None,
           say: Callable[[str], None] = print) -> Verification:  # fmt: skip
    """Check a run.

    Args:
        folder: of the run.
        replay: trains a part of it again.
        num_steps: most steps to repeat from one place.
        num_places: most places to repeat them from: the start of the run, or one of its checkpoints.
        seed: of the choice; None for another choice each time.
        say: takes a line on what is being done.

    Raises:
        ValueError: if the folder is not that of a run.
    """
    if not (folder / CONFIG_NAME).is_file() or not (folder / FILE_NAME).is_file():
        raise ValueError(f"{folder} is not the folder of a run: it lacks {CONFIG_NAME} or {FILE_NAME}")
    found = Verification([_files(folder), _verdict(folder)])
    try:
        run = _read(folder)
    except (ValueError, OSError) as error:
        found.findings.append(Finding("metrics", False, f"{FILE_NAME} cannot be read: {error}"))
        return found
    found.findings += [_of_checkpoints(run), _record(run), _adapter(run)]
    if run.elsewhere:
        found.findings.append(Finding("machine", None, f"compared within {TOLERANCE:.0%}: {run.elsewhere}"))
    places = _places(run, num_steps, num_places, random.Random(seed) if seed is not None else random.SystemRandom())
    for start, until in places:
        say(f"repeating steps {start + 1} to {until}")
        with tempfile.TemporaryDirectory() as work:
            found.findings.append(_repeated(run, start, until, Path(work) / "run", replay))
    return found


@dataclass(frozen=True)
class _Run:
    folder: Path
    steps: dict[int, StepMetrics]
    checkpoints: dict[int, Path]
    """Step -> the file; those that can be read."""
    marks: dict[int, Mark]
    """Step -> how far the metrics had come, as its checkpoint says."""
    problems: list[str]
    """Of the others."""
    num_processes: int
    elsewhere: str
    """In what this machine differs from that of the run; empty if in nothing that is recorded."""
    data: dict[str, str]
    """Digests of what it was trained on."""
    dtype: str | None
    """What its base was held in, where a checkpoint says so."""


def _read(folder: Path) -> _Run:
    metrics = TrainingMetrics.from_jsonl((folder / FILE_NAME).read_text(encoding="utf-8"))
    checkpoints: dict[int, Path] = {}
    marks: dict[int, Mark] = {}
    problems, dtype = [], None
    for path in sorted((folder / "checkpoints").glob("*.ckpt")):
        try:
            content = read_checkpoint(path)
            state, step = training_state.read(content), int(content["global_step"])
            record, dtype = state["record"], state.get("base_dtype")
            checkpoints[step], marks[step] = path, Mark(record["num_bytes"], record["sha256"])
        except (DamagedCheckpointError, ValueError, KeyError, TypeError) as error:
            problems.append(str(error))
    known = _circumstances(folder)
    start = known["starts"][-1] if known["starts"] else {}
    now = circumstances(step=0, device=str(start.get("device")), num_processes=int(start.get("num_processes", 1)))
    other = [name for name in SAME_MACHINE if start.get(name) != now[name]]
    differing = [f"{name} was {start.get(name)}, is {now[name]}" for name in other]
    if now["num_processes"] > 1:
        differing.append(f"{now['num_processes']} processes are repeated by one")
    steps = {step.step: step for step in metrics.steps}
    data = known["data"].get("sha256", {})
    return _Run(folder, steps, checkpoints, marks, problems, now["num_processes"], "; ".join(differing), data, dtype)


def _circumstances(folder: Path) -> dict[str, Any]:
    try:
        return read_circumstances(folder / CIRCUMSTANCES)
    except (OSError, ValueError):
        return {"starts": [], "data": {}}


def _files(folder: Path) -> Finding:
    if not (folder / sha256sums.FILE_NAME).is_file():
        return Finding("files", None, f"{sha256sums.FILE_NAME} is not there: the run has not come to its end")
    try:
        number, problems = sha256sums.differences(folder)
    except (ValueError, OSError) as error:
        return Finding("files", False, str(error))
    return Finding("files", not problems, "; ".join(problems) or f"{number} as the run left them")


def _verdict(folder: Path) -> Finding:
    outcome = read_outcome(folder)
    if outcome is None:
        return Finding("verdict", None, "there is none")
    return Finding("verdict", True, f"{outcome.result} at step {outcome.step}, base {outcome.base or 'unknown'}")


def _of_checkpoints(run: _Run) -> Finding:
    if run.problems:
        return Finding("checkpoints", False, "; ".join(run.problems))
    if not run.checkpoints:
        return Finding("checkpoints", None, "there are none: only the start can be repeated")
    return Finding("checkpoints", True, f"of {_listed(run.checkpoints)}, undamaged")


def _record(run: _Run) -> Finding:
    """Each checkpoint says how far the metrics had come, and their SHA-256."""
    problems = []
    for step, mark in run.marks.items():
        try:
            read_to_mark(with_set_aside(run.folder / FILE_NAME), mark)
        except ValueError as error:
            problems.append(f"not those that the checkpoint of step {step} was saved with: {error}")
    if problems:
        return Finding("metrics", False, "; ".join(problems))
    if not run.checkpoints:
        return Finding("metrics", None, "no checkpoint says what they were")
    return Finding("metrics", True, f"{len(run.steps):,} steps, as its checkpoints have them")


def _adapter(run: _Run) -> Finding:
    """The exported adapter is that of the last checkpoint, bit for bit."""
    path = run.folder / "adapter" / WEIGHTS_NAME
    if not path.is_file() or not run.checkpoints:
        return Finding("adapter", None, "there is none" if not path.is_file() else "no checkpoint to compare it with")
    last = max(run.checkpoints)
    trained = {name.removeprefix("model."): t for name, t in _weights(run.checkpoints[last]).items()}
    try:
        exported = {name.removeprefix(PREFIX): tensor for name, tensor in read_tensors(path).items()}
    except ValueError as error:
        return Finding("adapter", False, str(error))
    common = trained.keys() & exported.keys()
    if common != trained.keys() or any(trained[name].shape != exported[name].shape for name in common):
        return Finding("adapter", None, "written in another form than the checkpoint's: export.portable, or PEFT's own")
    if different := [name for name in sorted(common) if not torch.equal(trained[name], exported[name])]:
        return Finding("adapter", False, f"differs from the checkpoint of step {last}: {_some(different)}")
    return Finding("adapter", True, f"the {len(common)} tensors of the checkpoint of step {last}")


def _places(run: _Run, num_steps: int, num_places: int, chance: random.Random) -> list[tuple[int, int]]:
    """Where to repeat from, and until which step: to the next checkpoint, where that is within reach."""
    if not run.steps:
        return []
    last = max(run.steps)
    starts = [step for step in {0, *run.checkpoints} if step < last]
    chosen = chance.sample(starts, min(num_places, len(starts)))
    ends = {start: min(start + num_steps, last) for start in chosen}
    for start, end in ends.items():
        within = [step for step in run.checkpoints if start < step <= end]
        ends[start] = max(within, default=end)
    return sorted(ends.items())


def _repeated(run: _Run, start: int, until: int, work: Path, replay: Replay) -> Finding:
    name = f"steps {start + 1}-{until}"
    work.mkdir(parents=True)
    checkpoint = None
    if start:
        # Into a folder of its own, with the metrics that belong to it: the run's folder is only read.
        checkpoint = work / "checkpoints" / run.checkpoints[start].name
        checkpoint.parent.mkdir()
        shutil.copy2(run.checkpoints[start], checkpoint)
        for path in with_set_aside(run.folder / FILE_NAME):
            shutil.copy2(path, work)
    try:
        with kept_dtype(run.dtype):
            replay(run.folder / CONFIG_NAME, checkpoint, work, until, run.num_processes)
        steps = {step.step: step for step in TrainingMetrics.load(work / FILE_NAME).steps}
    except (ValueError, OSError, RuntimeError) as error:
        return Finding(name, False, f"cannot be repeated: {error}")
    recorded = read_outcome(run.folder)
    repeated = read_outcome(work)
    if recorded is not None and repeated is not None and recorded.base and recorded.base != repeated.base:
        return Finding(name, False, f"the base is another one: {recorded.base} is recorded, this is {repeated.base}")
    if recorded is not None and repeated is not None and recorded.adapter != repeated.adapter:
        adapters = f"{recorded.adapter or 'a new one'} is recorded, this is {repeated.adapter or 'a new one'}"
        return Finding(name, False, f"the adapter that training started from is another one: {adapters}")
    data = _circumstances(work)["data"].get("sha256", {})
    if changed := [kind for kind, digest in run.data.items() if data.get(kind) != digest]:
        return Finding(name, False, f"the {' and the '.join(changed)} are not those of the run")
    exact = not run.elsewhere
    for number in range(start + 1, until + 1):
        if number not in steps or number not in run.steps:
            return Finding(name, False, f"step {number} is not {'recorded' if number in steps else 'reached'}")
        was, now = run.steps[number], steps[number]
        for field_name in REPEATED:
            a, b = getattr(was, field_name), getattr(now, field_name)
            if not _agree(a, b, exact):
                return Finding(name, False, f"step {number} is the first that differs: {field_name} {a!r} is recorded, "
                               f"{b!r} comes out")  # fmt: skip
    weights = _compared_weights(run, until, work, exact)
    if weights.startswith("differ"):
        return Finding(name, False, f"after step {until} the weights {weights}")
    how = "bit for bit" if exact else f"within {TOLERANCE:.0%}"
    return Finding(name, True, f"losses, norms and tokens repeated {how}{weights}")


def _compared_weights(run: _Run, until: int, work: Path, exact: bool) -> str:
    """For the finding: empty where there is no checkpoint to compare with."""
    path = next(work.glob(f"**/step={until:08d}.ckpt"), None)
    if until not in run.checkpoints or path is None:
        return ""
    was, now = _weights(run.checkpoints[until]), _weights(path)
    if was.keys() != now.keys():
        return "differ in their names"
    equal = torch.equal if exact else _close
    different = [name for name in was if not equal(was[name], now[name])]
    return f"differ: {_some(different)}" if different else f", and the weights after step {until}"


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = read_checkpoint(checkpoint)["state_dict"]
    return weights


def _agree(was: Any, now: Any, exact: bool) -> bool:
    if was == now or (was != was and now != now):
        return True
    return not exact and math.isclose(was, now, rel_tol=TOLERANCE)


def _close(was: Tensor, now: Tensor) -> bool:
    return float((was.double() - now.double()).norm()) <= TOLERANCE * float(was.double().norm())


def _listed(steps: Sequence[int] | dict[int, Path]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} " + ", ".join(f"{step:,}" for step in sorted(steps))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
