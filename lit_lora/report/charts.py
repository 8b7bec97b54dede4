"""The charts of a report, as pictures in a page: SVG, drawn by matplotlib, one function a question.

Colours are those of Okabe and Ito, and viridis for heat maps: they stay apart for colour-blind readers and in grey.
Beside colour, runs differ by the dashes of their lines.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from lit_lora.metrics import StepMetrics, TrainingMetrics
from lit_lora.report.adapter_sizes import LayerUpdate

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "font.family": ["sans-serif"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "lit_lora",
}
_MOST_POINTS = 2000
"""Of a line: a screen shows no more, and a page of a long run stays small."""

_PHASES = ("load", "forward", "backward", "optimizer", "validation", "other")

_MOST_CELLS = 200
"""Of a heat map, across."""


def loss_chart(runs: Mapping[str, TrainingMetrics]) -> str:
    """Training loss by step, faint, its running mean, and the validation loss."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (name, metrics) in enumerate(runs.items()):
            color = COLORS[place % len(COLORS)]
            label = f"{name}: " if len(runs) > 1 else ""
            steps = [step for step in metrics.steps if step.num_target_tokens and math.isfinite(step.loss)]
            if steps:
                x, y = [step.step for step in steps], [step.loss for step in steps]
                window = max(1, len(y) // 20)
                if len(runs) == 1:
                    axes.plot(*_thinned(x, y), color=color, alpha=0.3, linewidth=0.8, label="training, each step")
                mean_label = f"{label}training, mean of {window} steps" if window > 1 else f"{label}training"
                axes.plot(*_thinned(x, _running_mean(y, window)), color=color, linestyle=_dash(place), label=mean_label)
            points = [(e["step"], e["val_loss"]) for e in metrics.validation if math.isfinite(e["val_loss"])]
            if points:
                axes.plot(*zip(*points, strict=True), color="black" if len(runs) == 1 else color, marker="o",
                          markersize=4, linewidth=1.0, linestyle=":", label=f"{label}validation")  # fmt: skip
        axes.set(xlabel="optimizer step", ylabel="nats per supervised token", title="Loss")
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0)
        if axes.lines:
            axes.legend(loc="upper right")

    return _picture(draw, 9.0, 3.6)


def steps_chart(runs: Mapping[str, TrainingMetrics]) -> str:
    """Learning rate, gradient norm and throughput by step."""

    def draw(figure: Figure) -> None:
        rows: list[tuple[str, str, Callable[[StepMetrics], float]]] = [
            ("Learning rate", "", lambda step: step.learning_rate),
            ("Gradient norm, before clipping", "L2", lambda step: step.grad_norm),
            ("Throughput", "tokens/s", lambda step: step.num_tokens / step.step_time_s if step.step_time_s else 0.0),
        ]
        for axes, (title, unit, value) in zip(figure.subplots(1, 3), rows, strict=True):
            for place, (name, metrics) in enumerate(runs.items()):
                steps = metrics.steps[1:] if unit == "tokens/s" else metrics.steps  # the first pays for warm-up
                points = [(step.step, value(step)) for step in steps if math.isfinite(value(step))]
                if points:
                    x, y = map(list, zip(*points, strict=True))
                    axes.plot(*_thinned(x, y), color=COLORS[place % len(COLORS)], linestyle=_dash(place),
                              linewidth=1.2, label=name)  # fmt: skip
            axes.set(xlabel="optimizer step", ylabel=unit, title=title)
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        if len(runs) > 1:
            figure.axes[0].legend()

    return _picture(draw, 9.0, 2.6)


def gradient_chart(gradients: Mapping[str, Mapping[int, float]], all_norms: Sequence[float]) -> str:
    """Norm of the gradient of each layer over the logged steps; colours as for all norms of the page."""
    layers = sorted(gradients, key=_in_order)
    steps = sorted({step for row in gradients.values() for step in row})
    steps = steps[:: max(1, math.ceil(len(steps) / _MOST_CELLS))]
    table = np.array([[gradients[layer].get(step, np.nan) for step in steps] for layer in layers])
    return _heat_map(
        "Gradient norm by layer", table, layers, [str(step) for step in steps], "optimizer step", "L2 norm", all_norms
    )


def update_chart(updates: Sequence[LayerUpdate], all_norms: Sequence[float]) -> str:
    """Size of the update that the adapter makes to each layer, by place and kind; colours as for all of the page."""
    kinds = list(dict.fromkeys(update.kind for update in updates))
    rows = list(dict.fromkeys(update.layer for update in updates))
    table = np.full((len(kinds), len(rows)), np.nan)
    for update in updates:
        here = kinds.index(update.kind), rows.index(update.layer)
        table[here] = np.hypot(np.nan_to_num(table[here]), update.norm_update)  # experts of one layer share a cell
    places = ["outside" if row is None else str(row) for row in rows]
    return _heat_map("Size of the update, scale · B A", table, kinds, places, "layer", "Frobenius norm", all_norms)


def halves_chart(updates: Sequence[LayerUpdate]) -> str:
    """Norms of A and B over the layers, one line a kind."""

    def draw(figure: Figure) -> None:
        kinds = list(dict.fromkeys(update.kind for update in updates))
        for axes, (half, norm) in zip(figure.subplots(1, 2), (("A", "norm_a"), ("B", "norm_b")), strict=True):
            for place, kind in enumerate(kinds):
                points = [(u.layer, getattr(u, norm)) for u in updates if u.kind == kind and u.layer is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), color=COLORS[place % len(COLORS)], marker="o",
                              markersize=2.5, linestyle=_dash(place), linewidth=1.0, label=kind)  # fmt: skip
            axes.set(xlabel="layer", ylabel="Frobenius norm", title=f"Size of {half}")
            axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        if figure.axes[1].lines:
            figure.legend(
                *figure.axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8.0
            )

    return _picture(draw, 9.0, 3.1)


def memory_chart(phases: Mapping[str, float], budget_mib: float | None) -> str:
    """Highest memory of each phase, and the budget."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names = [*(phase for phase in phases if phase not in _PHASES), *reversed(_PHASES)]
        names = [name for name in names if name in phases]
        bars = axes.barh(names, [phases[name] for name in names], color=COLORS[0])
        axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}", padding=3)
        axes.margins(x=0.12)
        if budget_mib is not None:
            axes.axvline(budget_mib, color=COLORS[1], linestyle="--", label=f"budget {budget_mib:,.0f} MiB")
            axes.legend()
        axes.set(xlabel="MiB, highest of the logged steps", title="Memory by phase")
        axes.grid(axis="y", visible=False)

    return _picture(draw, 9.0, 0.8 + 0.28 * max(2, len(phases)))


def _heat_map(
    title: str,
    table: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    across: str,
    unit: str,
    all_values: Sequence[float],
) -> str:
    """Colours by the logarithm where values differ by more than a factor of ten.

    A colour means the same on all maps that are compared: their values together give its ends.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values = np.concatenate([table.ravel(), np.asarray(all_values, dtype=float)])
        positive = values[np.isfinite(values) & (values > 0)]
        spread = positive.size and positive.max() > 10 * positive.min()
        norm = (LogNorm if spread else Normalize)(positive.min(), positive.max()) if positive.size else None
        image = axes.imshow(np.where(table > 0, table, np.nan), aspect="auto", cmap="viridis", norm=norm,
                            interpolation="nearest")  # fmt: skip
        axes.set_yticks(*_labels(rows, 24))
        axes.set_xticks(*_labels(columns, 14))
        axes.set(xlabel=across, title=title)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label=unit, pad=0.01)

    return _picture(draw, 9.0, min(6.0, 1.2 + 0.2 * len(rows)))


def _labels(names: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    places = range(0, len(names), max(1, math.ceil(len(names) / most)))
    return list(places), [names[place] for place in places]


def _picture(draw: Callable[[Figure], None], width: float, height: float) -> str:
    """The address of an SVG picture that holds itself."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def _dash(place: int) -> str:
    return DASHES[place // len(COLORS) % len(DASHES)] if place >= len(COLORS) else DASHES[place % len(DASHES)]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, ``window`` at most."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return list((sums[ends] - sums[starts]) / (ends - starts))


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    stride = max(1, math.ceil(len(x) / _MOST_POINTS))
    return x[::stride], y[::stride]


def _in_order(layer: str) -> tuple[str, int]:
    """``layers.10`` after ``layers.9``."""
    name, _, number = layer.rpartition(".")
    return (name, int(number)) if number.isdigit() else (layer, -1)
