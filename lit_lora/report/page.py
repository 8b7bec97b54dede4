"""A page to look at: one HTML file that holds all it shows, of one run or of several side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_lora.files.atomic import atomic_write
from lit_lora.report import charts
from lit_lora.report.run_files import RunFiles, read_run
from lit_lora.wording import setting

FILE_NAME = "report.html"
_TEMPLATE = "page.html.jinja"
_MOST_ANSWERS = 10
_NOT_SUPERVISED = re.compile(r"〔(.*?)〕", re.DOTALL)


def write_report(folders: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write a page about a run, or about several to compare them.

    Args:
        folders: of the runs; one may be going on.
        output: the file; by default ``report.html`` in the folder of the run, which must be a single one.

    Returns:
        The file.

    Raises:
        ValueError: if a folder is not that of a run, is named twice, or no file is named for several.
        OSError: if the file cannot be written.
    """
    folders = [folders] if isinstance(folders, str | Path) else list(folders)
    if not folders:
        raise ValueError("no run: name the folder of at least one")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"a run is named twice: {', '.join(map(str, folders))}")
    if output is None and len(folders) > 1:
        raise ValueError(f"a page that compares runs lies in none of their folders: set {setting('output')} to a file")
    runs = [read_run(folder) for folder in folders]
    path = Path(output) if output is not None else runs[0].folder / FILE_NAME
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file for the page, such as {path / FILE_NAME}")
    page = page_of(runs).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: file.write(page))
    return path


def page_of(runs: Sequence[RunFiles]) -> str:
    """The page, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = _names(runs)
    metrics = {name: run.metrics for name, run in zip(names, runs, strict=True)}
    has_steps = any(record.steps for record in metrics.values())
    gradients = [norm for run in runs for row in run.gradients.values() for norm in row.values()]
    sizes = [update.norm_update for run in runs for update in run.updates]
    shown = [_shown(name, run, gradients, sizes) for name, run in zip(names, runs, strict=True)]
    return environment.get_template(_TEMPLATE).render(
        runs=shown,
        number_names=list(dict.fromkeys(name for run in shown for name in run["numbers"])),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        loss=charts.loss_chart(metrics) if has_steps else None,
        steps=charts.steps_chart(metrics) if has_steps else None,
        differences=_differences(names, runs),
    )


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Of the folders; with more of the path where they are alike."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _shown(name: str, run: RunFiles, gradients: Sequence[float], sizes: Sequence[float]) -> dict[str, Any]:
    """With the norms of all runs of the page, for the colours."""
    return {
        "name": name,
        "folder": str(run.folder),
        "result": "no verdict" if run.outcome is None else run.outcome.result,
        "reasons": [] if run.outcome is None else run.outcome.reasons,
        "checks": [] if run.outcome is None else [_check(verdict) for verdict in run.outcome.verdicts],
        "changes": [] if run.outcome is None else run.outcome.changes,
        "numbers": _numbers(run),
        "gradients": charts.gradient_chart(run.gradients, gradients) if _is_table(run.gradients) else None,
        "updates": charts.update_chart(run.updates, sizes) if run.updates else None,
        "halves": charts.halves_chart(run.updates) if any(u.layer is not None for u in run.updates) else None,
        "memory": charts.memory_chart(run.memory_mib, run.budget_mib) if run.memory_mib else None,
        "data": run.circumstances.get("data", {}).get("summary", ""),
        "example": _pieces(run.circumstances.get("data", {}).get("example", "")),
        "scores": _scores(run.evaluations),
        "answers": _answers(next(iter(run.evaluations.values()), {})),
        "num_answers": len(next(iter(run.evaluations.values()), {}).get("expected", [])),
        "starts": run.circumstances.get("starts", []),
        "hashes": _hashes(run),
        "config": run.config_text,
        "missing": run.missing,
    }


def _check(verdict: Any) -> dict[str, str]:
    if verdict.passed is None:
        mark = "not judged" if verdict.asked else "not asked"
    else:
        mark = "passed" if verdict.passed else "failed"
    return {"name": verdict.name, "mark": mark, "detail": verdict.detail}


def _numbers(run: RunFiles) -> dict[str, str]:
    metrics, found = run.metrics, {}
    found["steps"] = f"{metrics.steps[-1].step:,}" if metrics.steps else "none"
    if losses := metrics.losses:
        found["training loss"] = f"{losses[0]:.3f} → {losses[-1]:.3f}"
    for source, losses in metrics.validation_losses.items():
        name = f"validation loss on {source}" if source else "validation loss"
        found[name] = " → ".join(f"{loss:.3f}" for loss in losses)
    if metrics.validation and "val_token_accuracy" in metrics.validation[-1]:
        found["token accuracy"] = f"{metrics.validation[-1]['val_token_accuracy']:.1%}"
    if shift := run.forgetting:
        found["loss on general text"] = f"{shift['base_loss']:.3f} → {shift['loss']:.3f}"
        found["KL to the base"] = f"{shift['kl']:.4f}"
    if len(metrics.steps) > 1:
        found["tokens per second"] = f"{metrics.tokens_per_s:,.0f}"
        found["tokens trained on"] = f"{metrics.num_tokens:,}"
    seconds = sum(step.step_time_s for step in metrics.steps)
    if seconds:
        found["time in steps"] = f"{seconds / 60:,.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
    if run.memory_mib:
        found["highest memory"] = f"{max(run.memory_mib.values()):,.0f} MiB"
    return found


def _hashes(run: RunFiles) -> dict[str, str]:
    found = {"base": "" if run.outcome is None else run.outcome.base}
    found |= run.circumstances.get("data", {}).get("sha256", {})
    return {name: value for name, value in found.items() if value}


def _pieces(text: str) -> list[tuple[bool, str]]:
    """An example of the data as (is it supervised, text), from the marks of :mod:`lit_lora.data.look.pieces`."""
    pieces, place = [], 0
    for match in _NOT_SUPERVISED.finditer(text):
        pieces += [(True, text[place : match.start()]), (match[1].startswith("×"), match[1])]
        place = match.end()
    return [piece for piece in [*pieces, (True, text[place:])] if piece[1]]


def _scores(evaluations: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Of each score of each adapter, with its interval, and what was found of it."""
    return [
        {"name": f"{name} ({adapter})" if adapter else name, "finding": score["finding"]}
        | {side: "{value:.2f} [{low:.2f}, {high:.2f}]".format(**score[side]) for side in ("before", "after")}
        for adapter, evaluation in evaluations.items()
        for name, score in evaluation.get("scores", {}).items()
    ]


def _answers(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    columns = [evaluation.get(name, []) for name in ("expected", "before", "after")]
    rows = list(zip(*columns, strict=False))[:_MOST_ANSWERS]
    return [{"expected": expected, "before": before, "after": after} for expected, before, after in rows]


def _is_table(gradients: Mapping[str, Mapping[int, float]]) -> bool:
    return len({step for row in gradients.values() for step in row}) > 1


def _differences(names: Sequence[str], runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs: key and value in each."""
    if len(runs) < 2:
        return []
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [(key, [settings.get(key, "—") for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "trainer.default_root_dir"]


def _flat(content: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(content, Mapping):
        return [(prefix, str(content))]
    return [pair for key, value in content.items() for pair in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
