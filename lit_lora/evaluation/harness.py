"""Tasks of EleutherAI's lm-evaluation-harness on a model that is loaded as for every other use here.

The harness gets the transformers model itself, in this process, so that a quantized base, a part of one that several
adapters share, or kinds of adapters that PEFT does not have are measured as they are trained. What it computes is its
own; nothing of it is repeated here. Optional: ``pip install 'lit-lora[harness]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora.evaluation.load import Loaded
from lit_lora.files.meant import closest, did_you_mean


def find_tasks(names: Sequence[str], folder: str | None = None) -> Any:
    """The harness's manager of tasks, which knows all of these.

    Args:
        names: of tasks or groups of them.
        folder: of tasks of one's own, as YAML files, beside those of the harness.

    Raises:
        ImportError: if the harness is not installed.
        FileNotFoundError: if there is no such folder.
        ValueError: naming tasks that are not there.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks of lm-evaluation-harness need it: pip install 'lit-lora[harness]'") from error
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}: give the one that holds the YAML files of your tasks")
    manager = TaskManager(include_path=folder)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        hints = "; ".join(
            f"{name}: {did_you_mean(closest(name, manager.all_tasks)) or 'nothing is named like it'}"
            for name in unknown
        )
        raise ValueError(f"no task of the {len(manager.all_tasks):,} that the harness knows is named so: {hints}")
    return manager


def run_tasks(
    loaded: Loaded,
    names: Sequence[str],
    manager: Any,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
) -> dict[str, dict[str, Any]]:
    """What the harness measures of a model.

    Args:
        loaded: the model, with its tokenizer.
        names: of the tasks.
        manager: of :func:`find_tasks`.
        num_fewshot: examples before each question; by default what the task says.
        limit: examples of each task; all if not given.
        batch_size: prompts at a time.
        chat: write each question into the chat template.

    Returns:
        For each task, and each group of them, its metrics by the harness's names: ``acc,none``, ``acc_stderr,none``.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=batch_size)
    found = simple_evaluate(
        model, tasks=list(names), task_manager=manager, num_fewshot=num_fewshot, limit=limit, apply_chat_template=chat,
        log_samples=False,
    )  # fmt: skip
    assert found is not None, "one process has the results"
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The numbers of several models side by side, with their standard errors.

    Args:
        results: by the name of the model, what :func:`run_tasks` has found.
    """
    columns = list(results)
    rows = [("task", "metric", *columns)]
    for task, metrics in results[columns[0]].items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "_stderr," not in metric:
                name, _, kind = metric.partition(",")
                shown = [_with_error(results[column][task], name, kind) for column in columns]
                rows.append((task, name if kind == "none" else f"{name} ({kind})", *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _with_error(metrics: dict[str, Any], name: str, kind: str) -> str:
    error = metrics.get(f"{name}_stderr,{kind}")
    return f"{metrics[f'{name},{kind}']:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
