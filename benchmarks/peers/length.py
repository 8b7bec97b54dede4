"""How time and memory of a step grow with the length of one example, LoRA on every linear layer.

    python -m benchmarks.peers.length --data gsm8k.jsonl

At each length, in turn: lit_lora's step and, in a process of its own, the products and attention it cannot do without.
Attention's work grows with the square of the length; what is left of the step should grow as the tokens do. As in
``benchmarks.peers.train`` no number without parity: gradients equal PEFT's at every length. Writes
``results/length.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.train import RESULTS, _parity, _prepare, _run, machine

COLUMNS = [
    "tokens", "step (s)", "products and attention alone (s)", "share", "attention alone (s)",
    "step without attention, a token (ms)", "peak RSS (MiB)", "a token (MiB)", "gradients equal PEFT's within",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL file with natural text")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=1, help="timed steps; one more comes first")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.workload, args.batch_size, args.quantized = "long", 1, False
    rows: list[list[str]] = []
    for length in args.lengths:
        args.length = length
        with tempfile.TemporaryDirectory() as folder:
            job = _prepare(args, Path(folder))
            parity = _parity(job, Path(folder))
            rounds = [(_measure("lit_lora", job, folder), _measure("limit", job, folder)) for _ in range(args.rounds)]
        rows.append(_row(length, rounds, parity))
        _write(rows, args)
        print("  ".join(rows[-1]), flush=True)


def _measure(framework: str, job: dict[str, Any], folder: str) -> dict[str, Any]:
    measured = _run(framework, job, Path(folder))
    if measured is None:
        raise SystemExit(f"{framework} did not run at this length; the shorter ones are written")
    return measured


def _row(length: int, rounds: list[tuple[dict[str, Any], dict[str, Any]]], parity: dict[str, float]) -> list[str]:
    step_s = statistics.median(mine["median_step_s"] for mine, _ in rounds)
    limit_s = statistics.median(least["median_step_s"] for _, least in rounds)
    attention_s = statistics.median(statistics.median(least["attention_s"]) for _, least in rounds)
    peak_mib = statistics.median(mine["peak_rss_mib"] for mine, _ in rounds)
    return [
        f"{length}", f"{step_s:.2f}", f"{limit_s:.2f}", f"{limit_s / step_s:.0%}", f"{attention_s:.2f}",
        f"{(step_s - attention_s) / length * 1e3:.2f}", f"{peak_mib:.0f}", f"{peak_mib / length:.2f}",
        f"{parity['gradient_difference']:.1e}",
    ]  # fmt: skip


def _write(rows: list[list[str]], args: argparse.Namespace) -> None:
    table = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    text = (
        f"# One example, longer and longer\n\n`{' '.join(['python -m benchmarks.peers.length', *sys.argv[1:]])}`\n\n"
        f"{machine(args.threads)}. {args.base}, float32, r = 8 on all "
        f"linear layers, all tokens supervised. Median of {args.rounds} rounds of {args.steps} steps.\n\n"
        + "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    )
    (RESULTS / "length.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
