"""The memory that each process needs to load a base: whole, and divided among two.

    python benchmarks/sharded_loading.py     # about 2 GB of disk in the temporary folder, 3 GB of memory, 2 minutes

A Llama of 1.1 GB with random weights is written as safetensors in several files. Then one process loads it whole, and
two load it divided, in float32 and in NF4 with double quantization. Each process reports its own peak while it loads,
above what it had after its imports: all of its resident memory (with the pages of the mapped files, which processes of
one machine share and the system can take back), and the anonymous part, which is its alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "sharded_loading.md"
SIZES = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any] | None] = {"float32": None, "NF4, double quantization": {}}


def _memory_mb() -> tuple[float, float]:
    """Resident and anonymous memory of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1.024e-3, int(lines["RssAnon"].split()[0]) * 1.024e-3


class Peaks:
    """The highest of both while it watches, a hundred times a second."""

    def __enter__(self) -> Peaks:
        self.before, self.most, self._done = _memory_mb(), (0.0, 0.0), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            now = _memory_mb()
            self.most = max(self.most[0], now[0]), max(self.most[1], now[1])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def load(folder: str, kind: str, world_size: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from lit_lora.base.load import load_base_model
    from lit_lora.base.shards import Sharding, held_bytes
    from lit_lora.base.streamed import load_sharded_base
    from lit_lora.config import QuantizationConfig

    torch.set_num_threads(1)
    options = KINDS[kind]
    quantization = None if options is None else QuantizationConfig(**options)
    if quantization is not None:
        import bitsandbytes  # noqa: F401 (it is not to count)
    if world_size > 1:
        dist.init_process_group("gloo")
        sharding = Sharding(init_device_mesh("cpu", (world_size,)))
    started = time.perf_counter()
    with Peaks() as peaks:
        if world_size > 1:
            model = load_sharded_base(folder, sharding, quantization=quantization)
        else:
            model = load_base_model(folder, quantization=quantization)
    elapsed_s, held = time.perf_counter() - started, held_bytes(model.requires_grad_(False))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    resident, anonymous = (most - before for most, before in zip(peaks.most, peaks.before, strict=True))
    return {"held": held / 1e6, "resident": resident, "anonymous": anonymous, "s": elapsed_s}


def _port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def measure(folder: str, kind: str, world_size: int) -> list[dict[str, Any]]:
    port = str(_port())
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--folder", folder, "--kind", kind, "--world_size", str(world_size)],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank),
                "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(world_size)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="(for the processes that are measured)")
    parser.add_argument("--kind", choices=list(KINDS))
    parser.add_argument("--world_size", type=int)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(load(options.folder, options.kind, options.world_size)))
        return
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with tempfile.TemporaryDirectory(prefix="lit-lora-sharded.") as folder:
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="300MB")
        stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
        lines = [
            "# Loading a base, whole and divided among two processes",
            "",
            f"`python benchmarks/sharded_loading.py`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores "
            f"({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}. A Llama of "
            f"{stored:,.0f} MB in float32 safetensors, from the system's cache of files; MB of 10^6, above what a "
            "process had after its imports.",
            "",
            "| base | processes | process | held afterwards | peak, resident | peak, anonymous | s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for kind in KINDS:
            for world_size in (1, 2):
                for rank, found in enumerate(measure(folder, kind, world_size)):
                    numbers = " | ".join(f"{found[key]:,.0f}" for key in ("held", "resident", "anonymous", "s"))
                    lines.append(f"| {kind} | {world_size} | {rank} | {numbers} |")
                    print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
