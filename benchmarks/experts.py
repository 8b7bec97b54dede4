"""Steps that train adapters on the fused experts of tiny mixtures, beside PEFT: time and peak memory.

    python -m benchmarks.experts

Both take the same random model, tokens, adapters (``target_parameters`` on both matrices of the experts), loss (the
model's own), optimizer and number of threads; only who adapts differs. Each run is a process of its own, in turn. Peaks
are the kernel's (``VmHWM``), the process with the loaded model included. Writes ``results/experts.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.peers.train import RESULTS, machine

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {**SIZES, "intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        **SIZES, "intermediate_size": 1024, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8,
        "head_dim": 64,
    },
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def ours(model: Any, r: int) -> None:
    from lit_lora import LoRAConfig, inject_lora
    from lit_lora.rewrites.routed_experts import check_routed_experts

    inject_lora(model, LoRAConfig(r=r, target_modules=[], target_parameters=EXPERTS))
    check_routed_experts(model)


def of_peft(model: Any, r: int) -> None:
    import peft

    peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=16, target_modules=[], target_parameters=EXPERTS))


LIBRARIES: dict[str, Callable[[Any, int], None]] = {"lit_lora": ours, "PEFT": of_peft}


def run(library: str, kind: str, args: argparse.Namespace) -> dict[str, float]:
    """One process's share: seconds of a step, and peaks in MB."""
    torch.set_num_threads(args.threads)
    import_module("lit_lora.rewrites.routed_experts"), import_module("peft")  # neither is counted
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind], initializer_range=0.02)
    model = transformers.AutoModelForCausalLM.from_config(config)
    loaded = _status_mb("VmRSS")
    LIBRARIES[library](model.train(), args.r)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(1)  # adapters start with as many random numbers as their library draws
    ids = torch.randint(3, config.vocab_size, (args.batch_size, args.length))
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    losses, times, cpu_times = [], [], []
    for _ in range(args.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
        losses.append(loss.item())
    return {
        "step_s": statistics.median(times[1:]), "cpu_s": statistics.median(cpu_times[1:]),
        "peak_mb": _status_mb("VmHWM"), "loaded_mb": loaded,
        "first_loss": losses[0], "last_loss": losses[-1],
        "experts": sum(p.numel() for p in model.parameters() if p.ndim == 3),
    }  # fmt: skip


def _status_mb(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6, help="of a process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(*args.one, args)))
        return
    again = [sys.executable, "-m", "benchmarks.experts", *sys.argv[1:], "--one"]
    rows = []
    for kind in MODELS:
        runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
        for _ in range(args.rounds):
            for library, done in runs.items():
                output = subprocess.run([*again, library, kind], stdout=subprocess.PIPE, text=True, check=True).stdout
                done.append(json.loads(output.splitlines()[-1]))
                print(kind, library, done[-1])
        rows += _rows(kind, runs)
    text = (
        "# Adapters on fused experts\n\n"
        f"`{' '.join(['python -m benchmarks.experts', *sys.argv[1:]])}`\n\n{machine(args.threads)}. Median of "
        f"{args.rounds} processes [lowest, highest], in turn; a step counts by the processor time it took (the time "
        "that passed stands beside it). "
        "Losses start alike, and part since every library starts its adapters from other random numbers. "
        f"{args.batch_size} x {args.length} tokens, r={args.r}, float32. For the step: the peak without what was "
        "resident with the libraries and the model loaded.\n\n| model | | CPU s/step | PEFT's speed | s/step | peak MB "
        "| of PEFT's | for the step, MB | of PEFT's | loss |\n|---|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
    (RESULTS / "experts.md").write_text(text, encoding="utf-8")
    print(text)


def _rows(kind: str, runs: dict[str, list[dict[str, float]]]) -> list[str]:
    def middle(library: str, value: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(value, runs[library]))

    values: dict[str, Callable[[dict[str, float]], float]] = {
        "step": lambda run: run["cpu_s"],
        "wall": lambda run: run["step_s"],
        "peak": lambda run: run["peak_mb"],
        "above": lambda run: run["peak_mb"] - run["loaded_mb"],
    }
    rows = []
    for library, done in runs.items():
        of_peft = {name: middle(library, value) / middle("PEFT", value) for name, value in values.items()}
        steps = sorted(map(values["step"], done))
        rows.append(
            f"| {kind}, {done[0]['experts'] / 1e6:.0f}M in experts | {library} "
            f"| {middle(library, values['step']):.2f} [{steps[0]:.2f}, {steps[-1]:.2f}] | {1 / of_peft['step']:.1f}x "
            f"| {middle(library, values['wall']):.2f} "
            f"| {middle(library, values['peak']):.0f} | {of_peft['peak']:.2f} | {middle(library, values['above']):.0f} "
            f"| {of_peft['above']:.2f} | {done[0]['first_loss']:.3f} -> {done[0]['last_loss']:.3f} |"
        )
    return rows


if __name__ == "__main__":
    main()
