"""Large data: time to the first batch against ``datasets.map``, memory of all processes, the second start.

    python -m benchmarks.data_size --rows 1000000

Writes rows of a conversation of about 200 tokens each, then, each in a process of its own: ``datasets.map`` over them
with two workers, which tokenizes with the same template and tokenizer; ``SFTDataModule`` to its first batch, without
and with a cache; and, over ten times as many rows in the cache, a split, a mixture and 20,000 packed batches of the
second epoch. A million rows need 11 GB of disk, most of it for ten million prepared ones (``--prepared_scale 0.5``
makes those half as long). Memory is what all processes of each hold together, sampled ten times a second: pages that
several share are counted once (PSS), files that the system keeps in memory for its own convenience are not. Writes
``results/data_size.md``.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from benchmarks.peers.train import RESULTS, machine
from lit_lora.files.shipped import FOLDER

WORKERS = 2

MAP = """
import sys, time
import datasets
from lit_lora import load_tokenizer
path, base, cache, kind = sys.argv[1:]
tokenizer = load_tokenizer(base)
begun = time.monotonic()
data = datasets.load_dataset("json", data_files=path, cache_dir=cache, split="train")
loaded = time.monotonic()

def whole(rows):
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in rows["messages"]]
    return {"ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

def masked(rows):
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in rows["messages"]]
    prompts = [tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
               for turns in rows["messages"]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    starts = [len(p) for p in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    return {"ids": ids, "mask": [[i >= start for i in range(len(row))] for row, start in zip(ids, starts)]}

data.map({"whole": whole, "masked": masked}[kind], batched=True, num_proc=WORKERS, remove_columns=data.column_names)
print("SECONDS", time.monotonic() - loaded, loaded - begun)
""".replace("WORKERS", str(WORKERS))

OURS = """
import sys, time
begun = time.monotonic()
from lit_lora import SFTDataModule
path, base, cache, workers = sys.argv[1:]
data = SFTDataModule(path, tokenizer=base, cache_dir=cache, tokenize_workers=int(workers))
data.prepare_data()
data.setup("fit")
next(iter(data.train_dataloader()))
print("SECONDS", time.monotonic() - begun, len(data.train_data), data.train_data.num_tokens)
"""

PREPARED = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import numpy as np
from lit_lora.data.prepared.array_file import write_arrays
from lit_lora.data.prepared.dataset import DatasetStatistics
path, rows, scale = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

class Rows:  # a segment of a hundred thousand
    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.lengths = self.random.integers(100 * scale, 300 * scale, 100_000, dtype=np.int32)
        self.tokens = int(self.lengths.sum())
    def shapes(self):
        n, t = (100_000,), (self.tokens,)
        return {"ids": (np.dtype(np.int32), t), "mask": (np.dtype(bool), t), "lengths": (np.dtype(np.int32), n),
                "lines": (np.dtype(np.int64), n), "supervised": (np.dtype(np.int32), n),
                "highest": (np.dtype(np.int32), n), "digests": (np.dtype(np.uint8), (100_000, 16))}
    def read(self, name, start=0, stop=None):
        dtype, shape = self.shapes()[name]
        if name == "lengths":
            return self.lengths
        if name == "supervised":
            return self.lengths - 1
        values = np.ones(shape, dtype)
        if name == "mask":  # nothing predicts a first token
            values[self.lengths.cumsum() - self.lengths] = False
        return values

statistics = json.dumps(asdict(DatasetStatistics("prepared", "messages", rows, 0, 0, 0, 0)))
with path.open("wb") as file:
    write_arrays(file, [Rows(seed) for seed in range(rows // 100_000)], {"statistics": statistics})
print("SECONDS", 0)
"""
"""What an earlier start would have left in the cache: a hundred thousand rows at a time, of lengths drawn at random."""

ALL_OF_IT = """
import sys, time
begun = time.monotonic()
from lit_lora import SFTDataModule
from lit_lora.data.rows.data_source import DataSource
path, base, cache, rows = sys.argv[1:]
data = SFTDataModule([DataSource(path, epochs=0.5)], tokenizer=base, cache_dir=cache, max_tokens_per_batch=2048,
                     validation_fraction=0.01)
data.prepare_data()
data.setup("fit")
assert len(data.train_data) == int(rows) * 99 // 100, len(data.train_data)
loader = data.train_dataloader()
next(iter(loader))
seconds = time.monotonic() - begun
loader.batch_sampler.set_epoch(1)
batches = iter(loader)
for _ in zip(range(20_000), batches):
    pass
print("SECONDS", seconds, len(loader))
"""
"""A split, a mixture, packing, shuffling, and the second epoch, whose plan is made to have as many batches."""


def write_rows(path: Path, rows: int) -> None:
    """Conversations of about 200 tokens, of words of the shipped data, no two alike."""
    text = (FOLDER / "data" / "requests_train.jsonl").read_text(encoding="utf-8")
    turns = [turn for line in text.splitlines() for turn in json.loads(line)["messages"]]
    words = sorted({word for turn in turns for word in turn["content"].split() if word.isalpha()})
    pick = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            turns = [
                {"role": "user", "content": f"{number}: {' '.join(pick.choices(words, k=pick.randint(20, 80)))}"},
                {"role": "assistant", "content": " ".join(pick.choices(words, k=pick.randint(40, 160)))},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def prepare(folder: Path, base: str, rows: int, scale: float) -> None:
    """A cache that has many rows for a file of one: as if the file had them."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"prompt": "1 + 1?", "completion": "2"}\n')
    measure(OURS, str(folder / "rows.jsonl"), base, str(folder), "1")
    (cached,) = folder.glob("*.safetensors")
    measure(PREPARED, str(cached), str(rows), str(scale))


def measure(code: str, *arguments: str) -> tuple[list[float], float, float, float]:
    """Run a script.

    Returns:
        What it printed after SECONDS, the processor time of all its processes, and the most memory that they held
        together, PSS and RSS in GiB.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    most = [0.0, 0.0]

    def sample() -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                tree = [root, *root.children(recursive=True)]
                infos = [one.memory_full_info() for one in tree]
            except psutil.Error:
                continue
            most[0] = max(most[0], sum(info.pss for info in infos) / 2**30)
            most[1] = max(most[1], sum(info.rss for info in infos) / 2**30)
            time.sleep(0.1)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    output, _ = process.communicate()
    thread.join()
    if process.returncode:
        raise SystemExit(f"the script ended with {process.returncode}:\n{output}")
    numbers = [line.split()[1:] for line in output.splitlines() if line.startswith("SECONDS")]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [float(number) for number in (numbers[0] if numbers else [])], cpu, most[0], most[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--prepared_rows", type=int, help="ten times as many by default")
    parser.add_argument("--prepared_scale", type=float, default=1.0, help="of their lengths; 1 for 200 tokens a row")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="whose tokenizer and template")
    parser.add_argument("--folder", help="where to work; a temporary one by default")
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--note", default="", help="about the machine, for the head of the table")
    args = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        data, cache = folder / "rows.jsonl", folder / "cache"
        write_rows(data, args.rows)
        size = data.stat().st_size / 2**20
        print(f"{args.rows:,} rows, {size:,.0f} MiB", flush=True)
        ours = (OURS, str(data), args.base, str(cache), str(WORKERS))
        rows = args.prepared_rows or 10 * args.rows
        many = folder / "many"
        runs = {
            f"`datasets.map`, {WORKERS} workers: whole conversations": (
                MAP, str(data), args.base, str(folder / "map"), "whole"
            ),
            f"`datasets.map`, {WORKERS} workers: conversations, prompts and masks": (
                MAP, str(data), args.base, str(folder / "map2"), "masked"
            ),
            f"`SFTDataModule` to the first batch, {WORKERS} workers": ours,
            "the same, tokens in the cache": ours,
            f"{rows:,} prepared rows of {200 * args.prepared_scale:.0f} tokens, a hundredth set aside and half of the "
            "rest in an epoch: to the first batch; memory through up to 20,000 batches of the second epoch": (
                ALL_OF_IT, str(many / "rows.jsonl"), args.base, str(many), str(rows)
            ),
        }  # fmt: skip
        for what, (code, *arguments) in runs.items():
            if args.only and not any(part in what for part in args.only):
                continue
            if code is MAP:
                shutil.rmtree(folder / "map", ignore_errors=True)  # of the one before, as large as the data
            if code is ALL_OF_IT:
                data.unlink()
                for used in (cache, folder / "map", folder / "map2"):
                    shutil.rmtree(used, ignore_errors=True)
                prepare(many, args.base, rows, args.prepared_scale)
            (seconds, *_), cpu, pss, rss = measure(code, *arguments)
            table.append(f"| {what} | {seconds:,.1f} | {cpu:,.1f} | {pss:.2f} | {rss:.2f} |")
            print(table[-1], flush=True)
    command = " ".join(["python -m benchmarks.data_size", *sys.argv[1:]])
    text = (
        f"# Large data\n\n`{command}`\n\n{machine(WORKERS)}. {args.note}\n\n{args.rows:,} rows of a conversation of "
        f"about 200 tokens, {size:,.0f} MiB of JSON lines. One run each. Of `datasets.map` only the time of `map` "
        "itself counts, not that of reading the JSON.\n\n"
        "| | s | processor s | memory, GiB (PSS) | RSS, shared pages counted for each process |\n"
        "|---|---|---|---|---|\n" + "\n".join(table) + "\n"
    )
    (RESULTS / "data_size.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
