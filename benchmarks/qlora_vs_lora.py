"""LoRA against QLoRA on the real SmolLM2-135M and GSM8K: same data in the same order, same adapters to start from.

    python -m benchmarks.qlora_vs_lora path/to/gsm8k/train.jsonl --steps 200

On a CPU with nothing else running: three runs of about 200 x 3 s each on two cores. ``--steps 4 --limit 64`` tries it
out. Each method runs in a process of its own, so that one's memory is not another's. Writes
``qlora_vs_lora{.csv,_curves.csv,.md,.png}`` into ``benchmarks/results/``.

The gap is QLoRA's validation loss above LoRA's: quantization opens it, training has to shrink it.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any] | None] = {
    "LoRA": None,
    "QLoRA NF4": {"double_quant": False},
    "QLoRA NF4-DQ": {},
    "QLoRA NF4-DQ, 8-bit embedding": {"embedding_bits": 8},
}
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = _arguments()
    if arguments.method:
        print(json.dumps(run(arguments)))
        return
    with tempfile.TemporaryDirectory() as work:
        results = {}
        for method in METHODS:
            print(f"=== {method}", flush=True)
            command = [sys.executable, "-m", "benchmarks.qlora_vs_lora", *sys.argv[1:], "--method", method]
            finished = subprocess.run([*command, "--work", work], stdout=subprocess.PIPE, text=True, check=True)
            results[method] = json.loads(finished.stdout.splitlines()[-1])
    write(results, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="GSM8K, train.jsonl")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=int, default=1000, help="rows of the data; a tenth of them to validate on")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--output", default=str(RESULTS))
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One method, in this process."""
    import lightning as L
    import torch

    from lit_lora import LoRAConfig, LoRALightningModule, OptimizationConfig, QuantizationConfig, SFTDataModule
    from lit_lora.base.base_weight import read_weight
    from lit_lora.interchange.peft_format import adapter_state_dict, load_adapter_state_dict
    from lit_lora.language_model.shared_prefix import share_prefix
    from lit_lora.memory.estimate import MemoryEstimate, estimate_memory
    from lit_lora.memory.storage_tracker import StorageTracker
    from lit_lora.report.circumstances import processor

    class TensorPeak(L.Callback):
        """What is alive at the peak of the third step, and what was predicted for its batch."""

        alive_bytes: int
        estimate: MemoryEstimate

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                batch = share_prefix(batch)
                rows = batch["seq_lens"]
                self.estimate = estimate_memory(
                    module.base, lengths=rows, lora=module.lora, quantization=module.quantization,
                    supervised=len(batch["target_ids"]) / sum(length - 1 for length in rows),
                )  # fmt: skip
                self.tracker = StorageTracker()
                self.tracker.__enter__()
                optimizer = trainer.optimizers[0]
                self.tracker.add([*module.parameters(), *module.buffers()])
                self.tracker.add(p.grad for p in module.parameters() if p.grad is not None)
                self.tracker.add(value for state in optimizer.state.values() for value in state.values())

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.tracker.__exit__(None, None, None)
                self.alive_bytes = self.tracker.peak().total

    peak = TensorPeak()
    fields = METHODS[arguments.method]
    L.seed_everything(0)
    module = LoRALightningModule(
        arguments.base,
        lora=LoRAConfig(r=arguments.r, lora_alpha=2 * arguments.r),
        quantization=None if fields is None else QuantizationConfig(**fields),
        optimization=OptimizationConfig(learning_rate=arguments.learning_rate),
    )
    trainer = L.Trainer(
        max_steps=arguments.steps, gradient_clip_val=1.0, callbacks=[peak], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with trainer.strategy.root_device:
        module.configure_model()
    start = Path(arguments.work) / "start.pt"  # every method's adapters start from the first one's
    if start.is_file():
        load_adapter_state_dict(module.model, torch.load(start))
    else:
        torch.save(adapter_state_dict(module.model), start)
    data = SFTDataModule(
        arguments.data, limit=arguments.limit, validation_fraction=0.1, batch_size=arguments.batch_size
    )
    before = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]["val_loss"]
    steps = module.training_metrics.steps
    layers = [m.base_layer for m in module.modules() if hasattr(m, "base_layer")]
    rates = [step.num_tokens / step.step_time_s for step in steps[2:] if step.step_time_s]
    return {
        "val_loss_start": before,
        "val_loss_end": after,
        "losses": [step.loss for step in steps],
        "tokens": [step.num_tokens for step in steps],
        "tokens_per_s": statistics.median(rates) if rates else 0.0,
        "tokens_per_s_spread": max(rates) - min(rates) if rates else 0.0,
        "base_mib": _base_bytes(module) / 2**20,
        "tensors_mib": peak.alive_bytes / 2**20,
        "estimate_mib": peak.estimate.peak.total / 2**20,
        "dequantize_s": 0.0 if fields is None else _seconds(lambda: [read_weight(x, torch.float32) for x in layers]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
    }


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _base_bytes(module: Any) -> int:
    """Bytes of the frozen base, with the scales of quantized blocks."""
    tensors = [p for p in module.parameters() if not p.requires_grad]
    for state in filter(None, (getattr(p, "quant_state", None) for p in list(tensors))):
        tensors += [state.absmax, state.state2.absmax] if state.nested else [state.absmax]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The table, the curves and the plot."""
    import torch

    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    lora = results["LoRA"]
    assert all(entry["tokens"] == lora["tokens"] for entry in results.values()), "the data came in another order"
    rows = []
    for method, entry in results.items():
        losses, window = entry["losses"], min(25, len(entry["losses"]) // 2)
        first, last = statistics.mean(losses[:window]), statistics.mean(losses[-window:])
        rows.append(
            {
                "method": method,
                "val_loss_start": round(entry["val_loss_start"], 4),
                "val_loss_end": round(entry["val_loss_end"], 4),
                "gap_start": round(entry["val_loss_start"] - lora["val_loss_start"], 4),
                "gap_end": round(entry["val_loss_end"] - lora["val_loss_end"], 4),
                "train_loss_first": round(first, 4),
                "train_loss_last": round(last, 4),
                "train_loss_drop": round(1 - last / first, 4),
                "val_loss_drop": round(1 - entry["val_loss_end"] / entry["val_loss_start"], 4),
                "base_mib": round(entry["base_mib"], 1),
                "tensors_mib": round(entry["tensors_mib"], 1),
                "estimate_mib": round(entry["estimate_mib"], 1),
                "dequantize_s": round(entry["dequantize_s"], 3),
                "tokens_per_s": round(entry["tokens_per_s"], 1),
                "tokens_per_s_spread": round(entry["tokens_per_s_spread"], 1),
            }
        )
    stem = folder / "qlora_vs_lora"
    _write_csv(stem.with_suffix(".csv"), rows)
    curves = [
        {"step": step + 1, **{method: round(entry["losses"][step], 5) for method, entry in results.items()}}
        for step in range(len(lora["losses"]))
    ]
    _write_csv(stem.with_name("qlora_vs_lora_curves.csv"), curves)
    options = " ".join(
        f"--{name} {getattr(arguments, name)}"
        for name in ("base", "steps", "limit", "batch_size", "learning_rate", "r")
    )
    lines = [
        f"`python -m benchmarks.qlora_vs_lora {Path(arguments.data).name} {options}`, {datetime.date.today()}, "
        f"{lora['device']}, {lora['threads']} threads, torch {torch.__version__}, Python {platform.python_version()}.",
        "Tensors: alive at the peak of the third step, beside the estimate for its batch. Dequantize: the weights of "
        "all adapted layers, once; a step does it twice. Gap: to LoRA's validation loss. Train loss: mean of up to 25 "
        "steps at each end.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows),
        "",
    ]
    stem.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    _plot(stem.with_suffix(".png"), results)
    print("\n".join(lines))
    for row in rows:
        off = row["estimate_mib"] / row["tensors_mib"] - 1
        print(
            f"{row['method']}: estimate {off:+.1%} of the tensors alive{'' if abs(off) < 0.05 else ' (MORE THAN 5%)'}"
        )
    for row in rows[1:]:
        shrunk = abs(row["gap_end"]) < abs(row["gap_start"])
        falls = row["val_loss_drop"] >= rows[0]["val_loss_drop"]
        print(
            f"{row['method']}: gap {row['gap_start']:.4f} -> {row['gap_end']:.4f} ({'shrank' if shrunk else 'GREW'}); "
            f"validation loss fell by {row['val_loss_drop']:.1%}, LoRA's by {rows[0]['val_loss_drop']:.1%}"
            f"{'' if falls else ' (LESS)'}"
        )


def _plot(path: Path, results: dict[str, dict[str, Any]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[2, 1])
    for method, entry in results.items():
        losses = entry["losses"]
        window = max(1, min(10, len(losses) // 4))
        smooth = [statistics.mean(losses[max(0, step - window + 1) : step + 1]) for step in range(len(losses))]
        left.plot(range(1, len(losses) + 1), smooth, label=method)
        right.plot(["start", "end"], [entry["val_loss_start"], entry["val_loss_end"]], marker="o", label=method)
    left.set(xlabel="optimizer step", ylabel="training loss, nats/token", title="Training (running mean)")
    right.set(ylabel="validation loss, nats/token", title="Validation")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
