"""Which start, and which variant, learns GSM8K best? Same data in the same order, three seeds each, real SmolLM2-135M.

    python -m benchmarks.starts --gsm8k path/to/gsm8k/train.jsonl

10 % of the rows are to validate on, others for each seed. Each run is a process of its own, the variants in turn for
each seed. Time is that of the processor, all threads together, so that the table can be made beside other work;
OMP_NUM_THREADS=1 makes it the plainest. On two cores about 10 minutes a run: name ``--variants`` and ``--seeds`` to do
a part. Rows of the table that is there already stay, so parts add up, those made side by side too, where ``--steps``,
``--limit``, ``--batch-size`` and ``--precision`` are the same. Writes ``starts{.csv,.md}`` into ``benchmarks/results``
after every run.

Runs of one seed see the same data in the same order, so what tells is the difference of their final validation losses
from ``default``'s of the same seed (``loftq``: from ``4 bits``'): a variant is better where all of them are negative,
and their mean is larger than their spread.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.earlier_rows import earlier_rows

RESULTS = Path(__file__).parent / "results"
RATE = 1e-3
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa_niter_16": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "eva": {"init_lora_weights": "eva"},
    "eva, LoRA-FA": {"init_lora_weights": "eva", "freeze_A": True},
    "LoRA-FA": {"freeze_A": True},
    "LoRA+ (4)": {"lora_plus_ratio": 4.0},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "4 bits": {"bits": 4},
    "4 bits, loftq": {"bits": 4, "init_lora_weights": "loftq"},
}
"""Name -> what is set beside rank 8 and alpha 16: of the adapter, of its optimization, of the base."""

COLUMNS = (
    "variant", "seed", "steps", "limit", "batch_size", "precision", "val_loss_before", "val_loss",
    "train_loss_last_25", "step_s", "start_s",
)  # fmt: skip
TEXTS = ("variant", "precision", "processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True, help="its train.jsonl")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=int, default=1000, help="rows of data")
    parser.add_argument("--batch-size", type=int, default=4, help="examples a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="bf16: base and steps"
    )
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments, *arguments.one)))
        return
    failed = []
    for seed in arguments.seeds:
        for variant in arguments.variants:
            command = [sys.executable, "-m", "benchmarks.starts", *sys.argv[1:], "--one", variant, str(seed)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if finished.returncode:
                failed.append(f"{variant}, seed {seed}")
                continue
            found = json.loads(finished.stdout.splitlines()[-1])
            rows = [row for row in known(arguments) if (row["variant"], row["seed"]) != (variant, seed)] + [found]
            print({name: found[name] for name in COLUMNS}, flush=True)
            write(rows, arguments)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def run(arguments: argparse.Namespace, variant: str, seed: str) -> dict[str, Any]:
    """One run, in this process."""
    import time
    from dataclasses import fields

    import lightning as L
    import torch

    from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, QuantizationConfig, SFTDataModule
    from lit_lora.report.circumstances import processor

    L.seed_everything(int(seed), verbose=False)
    set_ = VARIANTS[variant]
    of_adapter = {f.name for f in fields(LoRAConfig)}
    module = LoRALightningModule(
        arguments.base,
        lora=LoRAConfig(r=8, lora_alpha=16, **{name: value for name, value in set_.items() if name in of_adapter}),
        optimization=OptimizationConfig(learning_rate=RATE, lora_plus_ratio=set_.get("lora_plus_ratio", 1.0)),
        quantization=QuantizationConfig(bits=set_["bits"]) if "bits" in set_ else None,
        dtype="bfloat16" if arguments.precision == "bf16-mixed" else "float32",
    )

    class StepTimes(L.Callback):
        """Seconds of the processor from a batch's start to its end."""

        def __init__(self) -> None:
            self.began, self.taken = 0.0, list[float]()

        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            self.taken.append(time.process_time() - self.began)

    times = StepTimes()
    trainer = L.Trainer(
        max_steps=arguments.steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=-1,
        val_check_interval=arguments.steps, check_val_every_n_epoch=None, precision=arguments.precision,
        callbacks=[times],
    )  # fmt: skip
    data = SFTDataModule(
        arguments.gsm8k, limit=arguments.limit, validation_fraction=0.1, batch_size=arguments.batch_size, seed=int(seed)
    )
    trainer.fit(module, data)
    steps, validations = module.training_metrics.steps, module.training_metrics.validation
    return {
        "variant": variant, "seed": int(seed), "steps": arguments.steps, "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "val_loss_before": validations[0]["val_loss"], "val_loss": validations[-1]["val_loss"],
        "train_loss_last_25": statistics.mean(step.loss for step in steps[-25:]),
        "step_s": statistics.median(times.taken),
        "start_s": time.process_time() - sum(times.taken),
        "processor": processor(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def known(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier part of the same table."""
    rows = earlier_rows(Path(arguments.output) / "starts.csv", TEXTS)
    same = ("steps", "limit", "batch_size", "precision")
    return [row for row in rows if all(row[name] == getattr(arguments, name) for name in same)]


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The table of the runs so far."""
    import torch

    from lit_lora.files.atomic import atomic_write

    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*COLUMNS, "processor", "threads"])
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(folder / "starts.csv", lambda file: file.write(text.getvalue().encode()))
    seeds = " ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    lines = [
        "# Starts and variants on GSM8K",
        "",
        f"`python -m benchmarks.starts --gsm8k train.jsonl --steps {arguments.steps} --limit {arguments.limit} "
        f"--batch-size {arguments.batch_size} "
        f"--precision {arguments.precision} --seeds {seeds}`, "
        f"{datetime.date.today()}, {rows[0]['processor']}, {rows[0]['threads']} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {arguments.base}, r = 8 on all linear layers, learning rate {RATE}. "
        "Seconds are the processor's, all threads together; start is what a run takes beside its steps: imports, "
        "loading, the start itself, and two validations.",
        "",
        "| variant | validation loss before | after, by seed | mean | less the default's, by seed | their mean | "
        "their spread | training loss, last 25 steps | step, s | start, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in (name for name in VARIANTS if any(row["variant"] == name for row in rows)):
        mine = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["seed"])
        values = [row["val_loss"] for row in mine]
        compared = "4 bits" if variant == "4 bits, loftq" else "default"
        of_seed = {row["seed"]: row["val_loss"] for row in rows if row["variant"] == compared}
        less = [row["val_loss"] - of_seed[row["seed"]] for row in mine if row["seed"] in of_seed] or [float("nan")]
        lines.append(
            f"| {variant} | {statistics.mean(row['val_loss_before'] for row in mine):.4f} | "
            f"{' '.join(f'{value:.4f}' for value in values)} | {statistics.mean(values):.4f} | "
            f"{' '.join(f'{value:+.4f}' for value in less)} | {statistics.mean(less):+.4f} | "
            f"{max(less) - min(less):.4f} | {statistics.mean(row['train_loss_last_25'] for row in mine):.4f} | "
            f"{statistics.median(row['step_s'] for row in mine):.2f} | "
            f"{statistics.median(row['start_s'] for row in mine):.0f} |"
        )
    (folder / "starts.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
