"""Estimated peaks of a training step on CUDA for three models, LoRA and QLoRA, against the bounds they should hold.

``python -m benchmarks.memory_table`` writes ``benchmarks/results/memory_estimates.csv`` and ``.md``. Nothing is loaded
or trained: every number is traced with fake tensors (``lit_lora/memory.py``).
"""

from __future__ import annotations

import csv
import datetime
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from lit_lora.config import LoRAConfig, QuantizationConfig, StepConfig
from lit_lora.memory.estimate import MemoryEstimate, estimate_memory

RESULTS = Path(__file__).parent / "results"
SMOL, TINY, SEVEN = "smollm2-135m", "tinyllama-1.1b", "llama-2-7b"
METHODS = {
    "LoRA, bf16": None,
    "QLoRA, NF4": QuantizationConfig(double_quant=False),
    "QLoRA, NF4-DQ": QuantizationConfig(),
    "QLoRA, NF4-DQ, 8-bit embedding": QuantizationConfig(embedding_bits=8),
}
DQ, DQ8 = "QLoRA, NF4-DQ", "QLoRA, NF4-DQ, 8-bit embedding"


class Setup(NamedTuple):
    """One model, batch and adapter, by several methods."""

    model: str
    batch: tuple[int, ...]
    checkpointing: bool
    r: int
    targets: str
    bounds: dict[str, int] = {}  # noqa: RUF012 (method -> bytes, never written to)
    methods: tuple[str, ...] = tuple(METHODS)


SETUPS = [
    Setup(SMOL, (512,), True, 16, "all-linear", {DQ: 512_000_000, DQ8: 512_000_000}),
    Setup(SMOL, (512,) * 2, True, 16, "all-linear"),
    Setup(SMOL, (128,), True, 8, "q_proj v_proj", {DQ8: 512_000_000}),
    Setup(SMOL, (512,), False, 16, "all-linear"),
    Setup(TINY, (512,) * 4, True, 16, "all-linear", {DQ: 2_000_000_000, DQ8: 2_000_000_000}),
    Setup(TINY, (384,), False, 8, "all-linear", {DQ: 2_000_000_000, DQ8: 2_000_000_000}),
    Setup(SEVEN, (512,) * 4, True, 16, "all-linear", {DQ: 8_000_000_000, DQ8: 8_000_000_000}),
    Setup(SEVEN, (512,) * 2, False, 16, "all-linear", {DQ: 12_000_000_000, DQ8: 12_000_000_000}),
]


def rows() -> list[dict[str, Any]]:
    made = []
    for setup in SETUPS:
        targets: Any = setup.targets if setup.targets == "all-linear" else setup.targets.split()
        lora = single_base = None
        for method in setup.methods:
            start = time.perf_counter()
            found: MemoryEstimate = estimate_memory(
                f"random:{setup.model}",
                lengths=setup.batch,
                lora=LoRAConfig(r=setup.r, target_modules=targets),
                quantization=METHODS[method],
                step=StepConfig(recompute=setup.checkpointing),
                device="cuda",
            )
            base = found.phases["forward"].by_category["base"]
            lora = lora or found.cuda
            single_base = base if method == "QLoRA, NF4" else single_base
            bound = setup.bounds.get(method)
            made.append(
                {
                    "model": setup.model,
                    "method": method,
                    "examples": len(setup.batch),
                    "tokens_each": setup.batch[0],
                    "recomputed": "all" if setup.checkpointing else "none",
                    "r": setup.r,
                    "targets": setup.targets,
                    **{f"{phase}_mb": mb(peak.total) for phase, peak in found.phases.items()},
                    "peak_phase": found.peak_phase,
                    "base_mb": mb(base),
                    "activations_mb": mb(found.phases["forward"].by_category["activations"]),
                    "allocated_mb": mb(found.cuda.allocated),
                    "reserved_mb": mb(found.cuda.reserved),
                    "allocated_of_lora": round(found.cuda.allocated / lora.allocated, 3),
                    "reserved_of_lora": round(found.cuda.reserved / lora.reserved, 3),
                    "saved_by_double_quant_mb": mb(single_base - base) if single_base and method == DQ else "",
                    "bound_mb": mb(bound) if bound else "",
                    "holds": found.fits(bound) if bound else "",
                    "trace_s": round(time.perf_counter() - start, 1),
                }
            )
            print(
                {key: made[-1][key] for key in ("model", "method", "allocated_mb", "reserved_mb", "holds", "trace_s")}
            )
    return made


def mb(num_bytes: int) -> float:
    return round(num_bytes / 1e6, 1)


def markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        "| model | batch | recomputed | adapters | method | base | peak allocated | of LoRA's | reserved | of LoRA's "
        "| bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        bound = f"{row['bound_mb']:,.0f} {'held' if row['holds'] else 'exceeded'}" if row["bound_mb"] else ""
        lines.append(
            f"| {row['model']} | {row['examples']} x {row['tokens_each']} | {row['recomputed']} "
            f"| r={row['r']}, {row['targets']} | {row['method']} | {row['base_mb']:,.0f} | {row['allocated_mb']:,.0f} "
            f"| {row['allocated_of_lora']:.0%} | {row['reserved_mb']:,.0f} | {row['reserved_of_lora']:.0%} | {bound} |"
        )
    return "\n".join(lines)


def main() -> None:
    table = rows()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "memory_estimates.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    how = "CUDA tensors" if torch.cuda.is_available() else "CPU tensors with CUDA's types and attention"
    header = (
        "# Estimated peak memory of a training step on CUDA, MB (10^6 bytes)\n\n"
        f"`python -m benchmarks.memory_table`, {datetime.date.today()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Traced with fake {how}; nothing was run on CUDA hardware. All tokens supervised, "
        "fused AdamW, adapters in float32. The bound is held against what is reserved. The CUDA context and cuBLAS's "
        "workspace come on top.\n\n"
    )
    (RESULTS / "memory_estimates.md").write_text(header + markdown(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
