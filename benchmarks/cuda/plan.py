"""What the CUDA suite measures, in which order, and what its rows come to: ratios, bounds, verdicts."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda.data import TINY, base_of, config_of, dense, natural
from benchmarks.cuda.memory import CONTEXT_LIMITS_GB, ESTIMATE_TOLERANCE, LORA, compare, settings_of, setups_of
from benchmarks.cuda.speed import COMPILING, FRAMEWORKS, NEED_CUDA, QLORA_BAR, RATIO_BARS, job_of
from benchmarks.cuda.worker import GOOD, Measurement, Outcome, Row
from benchmarks.memory_table import DQ

__all__ = ["CONTEXT_LIMITS_GB", "PLANS"]

NEEDS_CUDA = "needs CUDA"
NOT_RUN = "not run: "
PROFILER = "profiler of torch"
CONTEXT_MODEL = "llama-2-7b"
CONTEXT_SECONDS = 90.0
LONG_STEP = (512,) * 16
"""8k tokens, where QLoRA is held against LoRA."""
UNKNOWN_LENGTH = 2048
"""Where the search for the longest context starts without an estimate, in tokens."""

Plan = list[Measurement]


def correctness(args: argparse.Namespace, folder: Path) -> Plan:
    """Checks on the tiny model, and the estimate on the first of the models."""
    base, device = base_of(TINY, folder), args.device
    on_cpu = NEEDS_CUDA if device == "cpu" else ""
    settings: Row = {"base": base, "device": device}
    plan = [
        Measurement("correctness", f"gradients, {dtype}", "gradients", {**settings, "dtype": dtype})
        for dtype in ("float32", "bfloat16")
    ]
    plan += [
        Measurement("correctness", "NF4 decode", "nf4_decode", settings),
        Measurement("correctness", "packed equals unpacked", "packed_equals_unpacked", settings),
    ]
    model = args.models[0]
    for method in (LORA, DQ):
        chosen = {**settings_of(setups_of(model)[0], method, base_of(model, folder), device), "trace": True}
        labels = {"model": model, "method": method}
        plan.append(Measurement("correctness", "memory estimate", "peaks", chosen, labels=labels, reason=on_cpu))
    plan.append(Measurement("correctness", "tests marked gpu", "gpu_tests", {}, limit_s=180, reason=on_cpu))
    return plan


def memory(args: argparse.Namespace, folder: Path) -> Plan:
    """Peaks of all models, then the longest contexts."""
    plan = []
    for model in args.models:
        for setup in setups_of(model):
            for method in (LORA, DQ):
                labels = {
                    "model": model, "method": method, "batch": f"{len(setup.batch)} x {setup.batch[0]}",
                    "recomputed": "all" if setup.checkpointing else "none", "r": setup.r,
                }  # fmt: skip
                settings = settings_of(setup, method, base_of(model, folder), args.device)
                plan.append(Measurement("memory", "peak of a step", "peaks", settings, labels=labels))
    for model in [model for model in args.models if model in (CONTEXT_MODEL, TINY)]:
        for limit_gb in args.context_gb:
            limit = int(limit_gb * 1e9)
            settings = {
                "base": base_of(model, folder),
                "r": 16,
                "device": args.device,
                "limit_bytes": limit,
                "seconds": CONTEXT_SECONDS,
            }
            labels = {"model": model, "method": DQ, "recomputed": "all", "r": 16, "limit_gb": limit_gb}
            plan.append(
                Measurement("memory", "longest context", "longest_context", settings, CONTEXT_SECONDS + 60, labels)
            )
    return plan


def estimates(plan: Plan, context_bytes: int) -> dict[str, Measurement]:
    """What to trace for a memory plan, by the key of the measurement that it belongs to."""
    found = {}
    for measurement in plan:
        settings = dict(measurement.settings)
        if measurement.measure == "longest_context":
            settings["limit_bytes"] -= context_bytes
        name = "estimates" if measurement.measure == "peaks" else "longest_estimate"
        found[measurement.key] = Measurement("memory", name, name, settings, limit_s=240)
    return found


def speed(args: argparse.Namespace, folder: Path) -> Plan:
    """Parity, the rate of products, then round after round of every framework on every model."""
    device = args.device
    parity_folder = _made(folder / "parity")
    base = base_of(TINY, folder)
    _write(parity_folder / "natural.json", natural(4, config_of(base).vocab_size, longest=160))
    job = job_of(base, parity_folder, "natural", device=device, batch_size=4, steps=1, warm_up=0, dtype="float32")
    adapter = Measurement(
        "speed", "initial adapter", "initial_adapter",
        {"base": base, "adapter": job["adapter"], "device": device, "random_B": True}, labels={"model": "parity"},
    )  # fmt: skip
    parity = Measurement(
        "speed", "parity with PEFT", "framework", {"framework": "parity", "job": job}, requires=(adapter.key,)
    )
    plan = [adapter, parity, Measurement("speed", "matrix products", "products", {"device": device})]
    plan.append(Measurement("speed", PROFILER, "profiler", {"device": device}))
    gate = () if args.anyway else (parity.key,)
    needed: dict[str, tuple[str, ...]] = {}
    for model in args.models:
        base, own = base_of(model, folder), _made(folder / model)
        first = Measurement(
            "speed", "initial adapter", "initial_adapter",
            {"base": base, "adapter": str(own / "adapter"), "device": device}, labels={"model": model},
            requires=gate,
        )  # fmt: skip
        plan.append(first)
        needed[model] = (*gate, first.key)
    # In a round what compiles comes last, one after another: it takes longest, and a budget that ends loses it first.
    compiling = [[name] for name in args.frameworks if name in COMPILING]
    together = [name for name in args.frameworks if name not in COMPILING]
    for round_number, names in [(number, names) for number in range(args.rounds) for names in (together, *compiling)]:
        for model in args.models:
            base, own = base_of(model, folder), _made(folder / model)
            jobs = {name: job_of(base, own, name, device=device, **fields) for name, fields in _workloads(args, model)}
            for name, job in jobs.items():
                _write(Path(job["examples"]), _examples(name, job, config_of(base).vocab_size, model))
            for name, workload, quantized in _runs(names):
                labels = {"model": model, "workload": workload, "base": "NF4" if quantized else "16 or 32 bits"}
                plan.append(
                    Measurement(
                        "speed", name, "framework",
                        {
                            "framework": name,
                            "job": {**jobs[workload], "quantized": quantized, "profile": round_number == 0},
                        },
                        limit_s=240.0 if name in COMPILING else 120.0, labels={**labels, "round": round_number + 1},
                        reason=NEEDS_CUDA if device == "cpu" and name in NEED_CUDA else "", requires=needed[model],
                    )
                )  # fmt: skip
    return plan


PLANS: dict[str, Callable[[argparse.Namespace, Path], Plan]] = {
    "correctness": correctness,
    "memory": memory,
    "speed": speed,
}


# ---------------------------------------------------------------------- while it runs


def why_not(measurement: Measurement, outcomes: Mapping[str, str]) -> str:
    """Why a measurement is not run, from what it is and what became of those before; empty if it is."""
    if measurement.reason:
        return measurement.reason
    for key in measurement.requires:
        if outcomes[key] not in GOOD:
            late = "out of time" if "out of time" in outcomes[key] else f"{key}: {outcomes[key]}"
            return outcomes[key] if outcomes[key].startswith(NOT_RUN) else f"{NOT_RUN}{late}"
    return ""


def adjust(measurement: Measurement, outcomes: Mapping[str, str]) -> None:
    """Ask for no profiled step where the profiler has failed: it would take the speed along."""
    if measurement.settings.get("job", {}).get("profile"):
        measurement.settings["job"]["profile"] = outcomes[PROFILER] in GOOD


def complete(measurement: Measurement, outcome: Outcome) -> None:
    """Put the estimate beside a memory measurement, and into the settings of one that starts from it."""
    measurement.labels |= outcome.values
    if outcome.status != "measured":
        measurement.labels["estimate"] = outcome.status
    if measurement.measure == "longest_context":
        measurement.settings["estimated_tokens"] = outcome.values.get("estimated_tokens", UNKNOWN_LENGTH)


# ---------------------------------------------------------------------- what rows come to


def finished(part: str, rows: Sequence[Row]) -> list[Row]:
    """Rows with what follows from them and from each other."""
    return {"correctness": _checked, "memory": _held, "speed": _compared}[part]([dict(row) for row in rows])


def _checked(rows: list[Row]) -> list[Row]:
    for row in rows:
        if "estimate_within" in row:
            row["status"] = "passed" if row["estimate_within"] else "failed"
            row["found"] = f"{row['estimate_error']:+.2%}"
            row["bound"] = f"{ESTIMATE_TOLERANCE:.0%}"
    return rows


def _held(rows: list[Row]) -> list[Row]:
    plain: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if "allocated_mb" not in row:
            continue
        if "estimated_allocated_mb" in row:
            row |= compare(row)
        setup = (row["model"], row["batch"], row["recomputed"])
        if row["method"] == LORA:
            plain[setup] = row["allocated_mb"]
        elif setup in plain:
            row["of_lora"] = row["allocated_mb"] / plain[setup]
            row["at_most_half"] = row["of_lora"] <= 0.5
        if "holds" in row:
            row["status"] = "passed" if row["holds"] else "failed"
    return rows


def _compared(rows: list[Row]) -> list[Row]:
    peak = next((row["tflops"] for row in rows if row["name"] == "matrix products" and "tflops" in row), None)
    speeds = {_which(row): row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    for row in rows:
        if "tokens_per_s" not in row:
            continue
        if peak:
            row["share"] = row["tflops"] / peak
        for column, name in {"ratio": "peft", "ratio_without_cudnn": "peft_without_cudnn"}.items():
            if row["workload"] == "natural" and (peft := speeds.get(_which({**row, "name": name}))):
                row[column] = row["tokens_per_s"] / peft
        if row["base"] == "NF4" and (lora := speeds.get(_which({**row, "base": "16 or 32 bits"}))):
            row["ratio_to_lora"] = row["tokens_per_s"] / lora
    return rows


def notes(part: str, rows: Sequence[Row], args: argparse.Namespace) -> list[str]:
    """What a reader of the table has to know, and how the bars came out."""
    if args.device == "cpu":
        return ["On a CPU, to try the suite out: no number here says anything about a GPU."]
    if part == "memory":
        return [
            "MB = 10^6 bytes. The bound is held against what is reserved. `driver_used_mb` is the whole device with "
            "the CUDA context, `context_mb` the same before the model was there. The estimate is compared with what "
            "is allocated without cuBLAS's workspaces."
        ]
    if part == "speed":
        return [
            "Real tokens a second, padding not counted; `ratio` to PEFT + Trainer at its defaults in the same round, "
            "`ratio_without_cudnn` to the same without cuDNN's attention; `share` of the rate of a large bf16 product, "
            "measured here, by the work that no exact step can do without. `launches` are the kernels of one more "
            "step, `gpu_ms` their time and that of its `copies`. Peaks include loading.",
            *verdicts(part, rows),
        ]
    return []


def verdicts(part: str, rows: Sequence[Row]) -> list[str]:
    """How the bars of a part came out, a line each."""
    return _bars(rows) if part == "speed" else []


def _bars(rows: Sequence[Row]) -> list[str]:
    found = []
    for model in dict.fromkeys(row["model"] for row in rows if "tokens_per_s" in row):
        mine = [row for row in rows if row.get("model") == model and "ratio" in row]
        by_name = {name: [row["ratio"] for row in mine if row["name"] == name] for name in FRAMEWORKS}
        medians = {name: statistics.median(ratios) for name, ratios in by_name.items() if ratios}
        bar, own = RATIO_BARS.get(model), medians.get("lit_lora")
        if bar and own:
            spread = f"[{min(by_name['lit_lora']):.2f}, {max(by_name['lit_lora']):.2f}]"
            found.append(f"{model}: {own:.2f} {spread} times PEFT + Trainer, bar {bar}: {_met(own >= bar)}.")
        without = [
            row["ratio_without_cudnn"] for row in mine if row["name"] == "lit_lora" and "ratio_without_cudnn" in row
        ]
        if bar and without:
            ratio = statistics.median(without)
            found.append(f"{model}: {ratio:.2f} times PEFT + Trainer without cuDNN's attention: {_met(ratio >= bar)}.")
        tuned = max((medians[name] for name in medians if name.startswith("peft")), default=None)
        best = max((medians[name] for name in medians if not name.startswith("peft")), default=None)
        if tuned and best:
            found.append(f"{model}: best of lit_lora {best:.2f}, best of PEFT {tuned:.2f}: {_met(best > tuned)}.")
        kept = [row["ratio_to_lora"] for row in rows if row.get("model") == model and "ratio_to_lora" in row]
        if kept:
            share = statistics.median(kept)
            found.append(f"{model}: QLoRA at {share:.0%} of LoRA's speed, dense batch: {_met(share >= QLORA_BAR)}.")
    return found


def result(row: Row) -> str:
    """What a row found, in a few words."""
    if "found" in row:
        return f"{row['found']} (bound {row['bound']})"
    if "reached_tokens" in row:
        estimated = row.get("estimated_tokens", "not")
        return f"{row['reached_tokens']} tokens in {row['limit_gb']:g} GB, estimated {estimated}"
    if "allocated_mb" in row:
        estimated = f", estimated {row['estimated_reserved_mb']:.0f}" if "estimated_reserved_mb" in row else ""
        half = f", {row['of_lora']:.2f} of LoRA" if "of_lora" in row else ""
        return f"{row['method']}, {row.get('batch', '')}: {row['reserved_mb']:.0f} MB reserved{estimated}{half}"
    if "tokens_per_s" in row:
        return ", ".join(_speed_of(row))
    if "tflops" in row:
        return f"{row['tflops']:.1f} TFLOP/s"
    return " ".join(str(row[key]) for key in ("workload", "base", "method", "batch", "limit_gb") if key in row)


def _speed_of(row: Row) -> list[str]:
    found = [f"{row['workload']}, {row['base']}: {row['tokens_per_s']:.0f} tokens/s"]
    found += [f"{row['ratio']:.2f} of peft"] if "ratio" in row else []
    found += [f"{row['ratio_to_lora']:.2f} of LoRA"] if "ratio_to_lora" in row else []
    step = f"{1000 * row['median_step_s']:.1f} ms a step"
    if "launches" in row:
        step += f" ({row['gpu_ms']:.1f} GPU, {row['launches']} launches, {row['waits']} waits)"
    memory = [f"{row['peak_allocated_mb'] / 1000:.1f} GB"] if "peak_allocated_mb" in row else []
    return [*found, step, *memory]


def is_bad(row: Row) -> bool:
    """Whether a row is a check that failed or a measurement that did not come about for a reason of its own."""
    status = row["status"]
    wrong = status == "failed" or status.startswith(("error", "out of memory", "stopped"))
    return wrong and not status.endswith("out of time")


def _met(holds: bool) -> str:
    return "met" if holds else "missed"


def _which(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("name", "model", "workload", "base", "round"))


def _workloads(args: argparse.Namespace, model: str) -> list[tuple[str, Row]]:
    warm_up = 1 if model == TINY else 8
    long_step = (64,) * 2 if model == TINY else LONG_STEP
    counts = {"warm_up": warm_up, "steps": warm_up + args.steps}
    shorter = {"warm_up": 2, "steps": 2 + max(args.steps // 2, 1)}
    return [
        ("natural", {**counts, "batch_size": args.batch_size}),
        ("dense", {**shorter, "batch_size": len(long_step)}),
    ]


def _runs(frameworks: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Framework, workload and whether the base is quantized, of one model in one round; dense batches once a round."""
    natural = [(name, "natural", False) for name in frameworks]
    if COMPILING & set(frameworks):
        return natural
    return [*natural[:2], ("lit_lora", "dense", False), ("lit_lora", "dense", True), *natural[2:]]


def _examples(workload: str, job: Row, vocab_size: int, model: str) -> list[Any]:
    count = (job["steps"] + 1) * job["batch_size"]  # one step more than is counted, to be profiled
    if workload == "natural":
        return natural(count, vocab_size)
    return dense([64 if model == TINY else LONG_STEP[0]] * count, vocab_size)


def _write(path: Path, examples: list[Any]) -> None:
    path.write_text(json.dumps(examples))


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
