"""Training speed and memory, side by side with the peers that are installed.

One command runs every framework in a process of its own, in turn (A B C, A B C, ...), on the same token lists in the
same order, from the same initial adapter, with the same optimizer, learning rate, clipping and batch size. Nothing is
timed before the adapter gradients of lit_lora and PEFT agree on the first batch; the losses stand in the table.

    python -m benchmarks.peers.train --data gsm8k.jsonl                         # natural lengths, LoRA
    python -m benchmarks.peers.train --data gsm8k.jsonl --quantized             # the same on an NF4 base
    python -m benchmarks.peers.train --data gsm8k.jsonl --workload dense        # packed to --length tokens
    python -m benchmarks.peers.train --data gsm8k.jsonl --ablation              # each technique of lit_lora off in turn

``--dtype bfloat16`` holds the base so in all of them, and peers get ``bf16=True``, with which they compute so; adapters
are float32 everywhere. Parity is shown in float32 all the same.

litgpt and torchtune need other versions, so they run in environments of their own (``pip install litgpt``; ``pip
install torchtune torchao==0.9.0``), whose interpreters ``--litgpt`` and ``--torchtune`` name; they add the rows
``litgpt``, in bfloat16 ``litgpt_mixed``, and ``torchtune``.

``--data`` is a JSONL file that ``lit-lora fit`` can read, of natural text. Peers: ``pip install -e .[bench]``.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
LORA = ["lit_lora", "peft", "trl", "trl_tuned", "limit"]
ABLATION = [
    "lit_lora", "no_onednn", "no_packing", "no_shared_prefix", "model_logits", "plain_linear", "no_mlp_recompute",
    "no_huge_pages", "checkpointing", "limit",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL file with natural text")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--workload", choices=["natural", "dense", "long"], default="natural")
    parser.add_argument("--length", type=int, default=512, help="tokens an example, for dense and long")
    parser.add_argument("--batch-size", type=int, default=4, help="examples a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps; one more comes first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frameworks", nargs="+", default=None)
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--quantized", action="store_true", help="NF4 base with double quantization")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base; see above")
    parser.add_argument("--litgpt", default=None, help="interpreter of an environment with litgpt; adds its rows")
    parser.add_argument("--litgpt-name", default="SmolLM2-135M-Instruct", help="what litgpt calls the base")
    parser.add_argument("--torchtune", default=None, help="interpreter of an environment with torchtune; adds its row")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--name", default=None, help="of the result files")
    args = parser.parse_args()
    frameworks = args.frameworks or (ABLATION if args.ablation else LORA)
    if args.litgpt:
        frameworks = [*frameworks, "litgpt", *["litgpt_mixed"] * (args.dtype == "bfloat16")]
    if args.torchtune:
        frameworks = [*frameworks, "torchtune"]
    name = args.name or "_".join(
        ["ablation" if args.ablation else "train", args.workload, "qlora" if args.quantized else "lora"]
        + ["bf16"] * (args.dtype == "bfloat16")
    )
    with tempfile.TemporaryDirectory() as folder:
        job = _prepare(args, Path(folder))
        parity = _parity(job, Path(folder))
        rows = []
        for round_number in range(args.rounds):
            for framework in frameworks:
                measured = _run(framework, job, Path(folder))
                if measured is None:
                    continue
                rows.append({"round": round_number, "framework": framework, **measured})
                print(
                    f"round {round_number + 1}/{args.rounds} {framework}: {measured['tokens_per_s']:.0f} tokens/s",
                    flush=True,
                )
            _write(name, rows, args, parity)  # after each round: a run that is stopped keeps those it had
    print((RESULTS / f"{name}.md").read_text())


def _prepare(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens, an initial adapter, and the settings all frameworks share, in one folder."""
    import torch

    from lit_lora import LoRAConfig, inject_lora, load_base_model, load_tokenizer, save_adapter
    from lit_lora.base.load import resolve_base
    from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source

    num_examples = args.batch_size * (args.steps + 1)
    tokenizer = load_tokenizer(args.base)
    limit = num_examples if args.workload == "natural" else None
    dataset = tokenize_source(
        args.data, tokenizer, SourceSettings(max_length=8192, limit=limit), cache_dir=folder / "cache"
    )
    examples = [(dataset[i].ids.tolist(), dataset[i].mask.tolist()) for i in range(len(dataset))]
    if args.workload != "natural":
        flat = [token for ids, _ in examples for token in ids]
        flat = (flat * (1 + num_examples * args.length // len(flat)))[: num_examples * args.length]
        mask = [False] + [True] * (args.length - 1)
        examples = [(flat[i * args.length : (i + 1) * args.length], mask) for i in range(num_examples)]
    (folder / "examples.json").write_text(json.dumps(examples[:num_examples]))
    torch.manual_seed(0)
    model = load_base_model(args.base, dtype="float32")
    inject_lora(model, LoRAConfig(r=8, lora_alpha=16))
    save_adapter(model, folder / "adapter", base_model_name=args.base)
    job = {
        "base": args.base,
        "examples": str(folder / "examples.json"),
        "adapter": str(folder / "adapter"),
        "batch_size": args.batch_size,
        "steps": args.steps + 1,
        "learning_rate": 2e-4,
        "threads": args.threads,
        "quantized": args.quantized,
        "dtype": args.dtype,
        "base_folder": str(resolve_base(args.base)[0]),
        "interpreters": {"litgpt": args.litgpt, "torchtune": args.torchtune},
        "litgpt_name": args.litgpt_name,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return job


def _parity(job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Largest difference of the adapter gradients of the mean loss to PEFT's, on the first batch."""
    measured = _run("parity", job, folder)
    if measured is None:
        raise SystemExit("no parity, no numbers: the comparison with PEFT did not run")
    if not measured["gradient_difference"] < 1e-5:
        raise SystemExit(
            f"no parity, no numbers: gradients differ from PEFT's by {measured['gradient_difference']:.1e}"
        )
    print(
        f"parity: adapter gradients equal PEFT's within {measured['gradient_difference']:.1e}",
        flush=True,
    )
    return measured


def _run(framework: str, job: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    environment.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    python, module = sys.executable, "frameworks"
    if (peer := framework.split("_")[0]) in job["interpreters"]:
        python, module = job["interpreters"][peer], f"{peer}_worker"
    process = subprocess.run(
        [python, "-W", "ignore", "-m", f"benchmarks.peers.{module}", framework, str(folder / "job.json")],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    if process.returncode:
        said = process.stderr.strip().splitlines()
        print(f"{framework} did not run (exit code {process.returncode}): {said[-1] if said else ''}", flush=True)
        return None
    result: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    if "step_times_s" in result:
        seconds = sum(result["step_times_s"])
        result["tokens_per_s"] = result["num_tokens"] / seconds
        result["target_tokens_per_s"] = result["num_target_tokens"] / seconds
        result["median_step_s"] = statistics.median(result["step_times_s"])
    return result


def _write(name: str, rows: list[dict[str, Any]], args: argparse.Namespace, parity: dict[str, float]) -> None:
    RESULTS.mkdir(exist_ok=True)
    fields = [
        "round", "framework", "tokens_per_s", "target_tokens_per_s", "median_step_s", "peak_rss_mib",
        "time_to_first_step_s", "first_loss", "last_loss",
    ]  # fmt: skip
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    order = list(dict.fromkeys(row["framework"] for row in rows))
    reference = "peft" if "peft" in order else order[0]
    baseline = {row["round"]: row["tokens_per_s"] for row in rows if row["framework"] == reference}
    limit = {row["round"]: row["tokens_per_s"] for row in rows if row["framework"] == "limit"}
    lines = [
        f"# {name}",
        "",
        f"`{' '.join(['python -m benchmarks.peers.train', *sys.argv[1:]])}`",
        "",
        f"{machine(args.threads)}. Median of {len(set(row['round'] for row in rows))} rounds [lowest, highest]. "
        f"Adapter gradients equal PEFT's within {parity['gradient_difference']:.1e} "
        f"(the largest is {parity['largest_gradient']:.2f}).",
        "",
        f"| framework | real tokens/s | supervised tokens/s | ratio to {reference} | share of limit | step (s) "
        "| peak RSS (MiB) | first step after (s) | loss first, last |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for framework in order:
        mine = [row for row in rows if row["framework"] == framework]
        speeds = sorted(row["tokens_per_s"] for row in mine)
        ratios = [row["tokens_per_s"] / baseline[row["round"]] for row in mine if row["round"] in baseline]
        share = [row["tokens_per_s"] / limit[row["round"]] for row in mine if row["round"] in limit]

        def median(key: str, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.median(row[key] for row in mine)

        lines.append(
            f"| {framework} | {statistics.median(speeds):.0f} [{speeds[0]:.0f}, {speeds[-1]:.0f}] "
            f"| {median('target_tokens_per_s'):.0f} | {statistics.median(ratios):.2f} "
            f"| {f'{statistics.median(share):.0%}' if share else '-'} "
            f"| {median('median_step_s'):.2f} | {median('peak_rss_mib'):.0f} | {median('time_to_first_step_s'):.1f} "
            f"| {median('first_loss'):.4f}, {median('last_loss'):.4f} |"
        )
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def machine(num_threads: int) -> str:
    """Date, processor and versions, for the head of a table."""
    from lit_lora.report.circumstances import processor

    packages = ("torch", "transformers", "peft", "lightning")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    return f"{date.today()}, {processor()}, {num_threads} threads; {versions}"


if __name__ == "__main__":
    main()
