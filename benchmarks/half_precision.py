"""Does bfloat16 on a CPU train as well as float32? Same data in the same order, three seeds each, real SmolLM2-135M.

    python -m benchmarks.half_precision --gsm8k path/to/gsm8k/train.jsonl

Two tasks: GSM8K (4 examples a step, 10 % of 1000 rows to validate on), and the quickstart's data by its own recipe,
with exact match on its 100 held-out examples. Each run is a process of its own, the two types in turn, so that noise
falls on both. On two cores 5 to 12 minutes a run: name ``--tasks`` and ``--seeds`` to do a part. Rows of the table that
is there already stay, so parts add up, also those made side by side. Writes
``half_precision{.csv,_curves.csv,.md,.png}`` into ``benchmarks/results/``, after every run.

float32 against bfloat16: the difference of the mean final validation losses has to lie within the spread of the seeds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.earlier_rows import earlier_rows

RESULTS = Path(__file__).parent / "results"
DATA = Path(__file__).parent.parent / "configs" / "data"
DTYPES = ("float32", "bfloat16")
KEY = ("task", "seed", "dtype")
TEXTS = ("task", "dtype", "processor", "losses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True, help="its train.jsonl")
    parser.add_argument("--tasks", nargs="+", choices=["gsm8k", "quickstart"], default=["gsm8k", "quickstart"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments, *arguments.one)))
        return
    for task in arguments.tasks:
        for seed in arguments.seeds:
            for dtype in DTYPES:
                command = [sys.executable, "-m", "benchmarks.half_precision", *sys.argv[1:], "--one", task, str(seed)]
                finished = subprocess.run([*command, dtype], stdout=subprocess.PIPE, text=True, check=True)
                row = json.loads(finished.stdout.splitlines()[-1])
                losses = row.pop("losses")
                print(row, flush=True)
                write(row, losses, arguments)


def run(arguments: argparse.Namespace, task: str, seed: str, dtype: str) -> dict[str, Any]:
    """One run, in this process."""
    import lightning as L
    import torch

    from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, SFTDataModule, save_adapter
    from lit_lora.report.circumstances import processor

    L.seed_everything(int(seed), verbose=False)
    quickstart = task == "quickstart"
    module = LoRALightningModule(
        arguments.base,
        dtype=dtype,  # type: ignore[arg-type]
        lora=LoRAConfig(r=8, lora_alpha=16),
        optimization=OptimizationConfig(learning_rate=2e-3 if quickstart else 1e-3),
    )
    trainer = L.Trainer(
        max_steps=arguments.steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    if quickstart:
        train = str(DATA / "requests_train.jsonl")
        data = SFTDataModule(train, validation_fraction=0.05, batch_size=8, seed=int(seed))
    else:
        data = SFTDataModule(arguments.gsm8k, limit=1000, validation_fraction=0.1, batch_size=4, seed=int(seed))
    trainer.fit(module, data)
    steps = module.training_metrics.steps
    trainer.limit_val_batches = 1.0
    after = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    found = {
        "task": task, "seed": int(seed), "dtype": dtype, "steps": arguments.steps, "val_loss": after,
        "train_loss_last_25": statistics.mean(step.loss for step in steps[-25:]),
        "tokens_per_s": sum(s.num_tokens for s in steps[2:]) / sum(s.step_time_s for s in steps[2:]),
        "exact_match": "", "processor": processor(), "threads": torch.get_num_threads(),
        "losses": [step.loss for step in steps],
    }  # fmt: skip
    if quickstart:
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(module.model, folder, base_model_name=arguments.base)
            found["exact_match"] = _exact_match(folder, arguments.base, dtype)
    return found


def _exact_match(adapter: str, base: str, dtype: str) -> int:
    """Held-out answers of 100 that are right to the letter."""
    import lit_lora

    rows = [json.loads(line)["messages"] for line in (DATA / "requests_test.jsonl").open(encoding="utf-8")]
    loaded = lit_lora.load(adapter, base=base, dtype=dtype)
    answers = lit_lora.generate(loaded, [row[:-1] for row in rows], format="chat", max_new_tokens=64, batch_size=25)
    return sum(a.text.strip() == row[-1]["content"] for a, row in zip(answers, rows, strict=True))


def write(row: dict[str, Any], losses: list[float], arguments: argparse.Namespace) -> None:
    """The table and the plot of the runs so far, with one more."""
    import torch

    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = _with(folder / "half_precision.csv", [row], arguments.steps)
    curve = [{**{name: row[name] for name in KEY}, "steps": arguments.steps, "losses": json.dumps(losses)}]
    curves = _with(folder / "half_precision_curves.csv", curve, arguments.steps)
    lines = [
        "# bfloat16 against float32 on a CPU",
        "",
        f"`python -m benchmarks.half_precision --gsm8k train.jsonl --steps {arguments.steps}`, "
        f"{datetime.date.today()}, {row['processor']}, {row['threads']} threads a run, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {arguments.base}, r = 8 on all linear layers.",
        "",
        "| task | dtype | final validation loss, by seed | mean | spread | training loss, last 25 steps | tokens/s | "
        "exact match of 100 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in dict.fromkeys(row["task"] for row in rows):
        for dtype in DTYPES:
            mine = [row for row in rows if (row["task"], row["dtype"]) == (task, dtype)]
            if not mine:
                continue
            values = [row["val_loss"] for row in mine]
            mean = statistics.mean(values)
            matches = " ".join(str(row["exact_match"]) for row in mine)
            lines.append(
                f"| {task} | {dtype} | {' '.join(f'{value:.4f}' for value in values)} | {mean:.4f} | "
                f"{max(values) - min(values):.4f} | {statistics.mean(row['train_loss_last_25'] for row in mine):.4f} | "
                f"{statistics.median(row['tokens_per_s'] for row in mine):.0f} | {matches} |"
            )
    (folder / "half_precision.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    _plot(folder / "half_precision.png", curves)


def _with(path: Path, new: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """The rows of a file, those of as many steps, with new ones in their places; written."""
    known = earlier_rows(path, TEXTS)
    rows = {tuple(row[name] for name in KEY): row for row in (*known, *new) if row["steps"] == steps}
    ordered = [rows[key] for key in sorted(rows)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(new[0]))
        writer.writeheader()
        writer.writerows(ordered)
    return ordered


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """``rows``: KEY and ``losses``, JSON."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for row in (row for row in rows if row["task"] == task):
            losses = json.loads(row["losses"])
            smooth = [statistics.mean(losses[max(0, step - 9) : step + 1]) for step in range(len(losses))]
            style = {"color": "C0" if row["dtype"] == "float32" else "C1", "linewidth": 1, "alpha": 0.8}
            axis.plot(range(1, len(losses) + 1), smooth, label=f"{row['dtype']}, seed {row['seed']}", **style)
        axis.set(title=task, xlabel="optimizer step", ylabel="training loss, nats/token (running mean of 10)")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
