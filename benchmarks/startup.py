"""How long ``lit-lora fit`` takes to its first step, beside what no such program can do without.

    python -m benchmarks.startup --data gsm8k.jsonl

The floor is a process that imports torch, lightning and transformers and loads the weights. Each is a process of its
own, from its start (``fit`` to the end of the first optimizer step), in turn. The first ``fit`` of all tokenizes the
data, the others find the tokens in the cache. Writes ``results/startup.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.peers.train import RESULTS, machine

FLOOR = """
import torch, lightning.pytorch, transformers
from lit_lora.base.load import resolve_base
transformers.AutoModelForCausalLM.from_pretrained(resolve_base({base!r})[0], dtype=torch.float32)
"""
FIT = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from lit_lora.__main__ import main
register_optimizer_step_post_hook(lambda *_: os._exit(0))
main(sys.argv[1:])
"""
HELP = "from lit_lora.__main__ import main; main(['--help'])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL file with natural text")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--limit", type=int, default=1000, help="rows of the data")
    parser.add_argument("--batch_size", type=int, default=1, help="examples of the first step")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model.base": args.base, "data.train": args.data, "data.limit": args.limit,
            "data.batch_size": args.batch_size, "data.validation_fraction": 0, "data.cache_dir": f"{folder}/cache",
            "trainer.default_root_dir": f"{folder}/run", "trainer.accelerator": "cpu", "trainer.max_steps": 1000,
        }  # fmt: skip
        fit = ["fit", *(f"--{name}={value}" for name, value in options.items())]
        with_tokenizing = _seconds(FIT, *fit)
        runs = [
            (_seconds(FLOOR.format(base=args.base)), _seconds(FIT, *fit), _seconds(HELP)) for _ in range(args.rounds)
        ]
    floor, cached, helps = (sorted(column) for column in zip(*runs, strict=True))
    ratio = statistics.median(fitted / least for least, fitted, _ in runs)
    command = " ".join(["python -m benchmarks.startup", *sys.argv[1:]])
    text = (
        f"# Start of a run\n\n`{command}`\n\n{machine(os.cpu_count() or 1)}. "
        f"Median of {args.rounds} rounds [lowest, highest], seconds.\n"
        "\n| | s | of the imports and weights |\n|---|---|---|"
        f"\n| importing torch, lightning and transformers, and loading the weights | {_row(floor)} | 1.00 |"
        f"\n| `lit-lora fit` to the end of its first step, tokens in the cache | {_row(cached)} | {ratio:.2f} |"
        f"\n| the same, tokenizing {args.limit} rows, one run | {with_tokenizing:.1f} "
        f"| {with_tokenizing / statistics.median(floor):.2f} |"
        f"\n| `lit-lora --help` | {_row(helps)} | |\n"
    )
    (RESULTS / "startup.md").write_text(text, encoding="utf-8")
    print(text)


def _row(times: list[float]) -> str:
    return f"{statistics.median(times):.2f} [{times[0]:.2f}, {times[-1]:.2f}]"


def _seconds(code: str, *arguments: str) -> float:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode()[-2000:])
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
