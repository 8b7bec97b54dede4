"""The memory that ``lit-lora merge`` needs: the base in memory as a whole, and a layer at a time.

    python -m benchmarks.merge_memory     # about 10 GB of disk in the temporary folder, 10 GB of memory, some minutes

A Llama of the sizes of TinyLlama-1.1B with random weights is written as safetensors of at most 250 MB, with an
adapter of rank 8 on all linear layers. Each way merges in a process of its own, which reports its peak above what it
had after its imports: all of its resident memory (with the pages of mapped files, which the system can take back), and
the anonymous part. The two results are compared tensor by tensor. Writes ``results/merge_memory.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.sharded_loading import Peaks
from lit_lora.report.circumstances import processor

RESULTS = Path(__file__).parent / "results" / "merge_memory.md"
SIZES = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
WAYS = {"whole": "the base as a whole", "parts": "a layer at a time"}


def make(folder: Path, dtype: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lit_lora import LoRAConfig, inject_lora, save_adapter
    from lit_lora.adapters.layers import lora_layers
    from lit_lora.base.byte_tokenizer import byte_tokenizer
    from lit_lora.base.load import load_base_model

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=getattr(torch, dtype))
    model.save_pretrained(folder / "base", max_shard_size="250MB")
    byte_tokenizer().save_pretrained(folder / "base")
    model = load_base_model(str(folder / "base"), dtype=dtype)
    inject_lora(model, LoRAConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    for _, layer in lora_layers(model):
        for factor in layer.factors():
            torch.nn.init.normal_(factor, std=0.01)
    save_adapter(model, folder / "adapter")
    files = [path.stat().st_size for path in (folder / "base").glob("*.safetensors")]
    layer = sum(p.nbytes for p in model.model.layers[0].parameters() if not p.requires_grad)
    outside = model.model.embed_tokens.weight.nbytes + model.lm_head.weight.nbytes
    return {"base": sum(files) / 1e6, "file": max(files) / 1e6, "layer": layer / 1e6, "outside": outside / 1e6}


def merge(folder: Path, way: str, dtype: str) -> None:
    import torch

    from lit_lora.evaluation import merge as merging

    torch.set_num_threads(1)
    if way == "whole":
        vars(merging)["open_base"] = lambda *_, **__: "it is to be compared"
    started = time.perf_counter()
    with Peaks() as peaks:
        merging.merge(str(folder / "adapter"), folder / way, dtype=dtype, num_samples=4)
    elapsed = time.perf_counter() - started
    most = [peak - before for peak, before in zip(peaks.most, peaks.before, strict=True)]
    print(json.dumps({"resident": most[0], "anonymous": most[1], "s": elapsed}))


def _tensors(folder: Path) -> dict[str, str]:
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                import torch

                data = file.get_tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().data
                found[name] = hashlib.sha256(data).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.way:
        merge(args.folder, args.way, args.dtype)
        return
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call = [sys.executable, "-m", "benchmarks.merge_memory", "--dtype", args.dtype, "--folder", name]
        made = "from pathlib import Path; import json; from benchmarks.merge_memory import make; "
        made += f"print(json.dumps(make(Path({name!r}), {args.dtype!r})))"
        sizes = json.loads(_last_line([sys.executable, "-c", made]))
        rows = {way: json.loads(_last_line([*call, "--way", way])) for way in WAYS}
        equal = _tensors(folder / "whole") == _tensors(folder / "parts")
        num_files = {way: len(list((folder / way).glob("*.safetensors"))) for way in WAYS}
    lines = [
        "# Memory of merging\n",
        f"`python -m benchmarks.merge_memory --dtype {args.dtype}`, {date.today()}, {processor()} with other work "
        f"beside it, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}. A Llama of {sizes['base']:,.0f} MB in {args.dtype} safetensors of at most "
        f"{sizes['file']:,.0f} MB; a layer has {sizes['layer']:,.0f} MB, embedding and head together "
        f"{sizes['outside']:,.0f} MB. Peaks of the process in MB of 10^6 above what it had after its imports. The two "
        f"results {'are equal bit for bit' if equal else 'DIFFER'}.\n",
        "| in memory | peak, resident | peak, anonymous | s | files |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, row in rows.items():
        lines.append(
            f"| {WAYS[way]} | {row['resident']:,.0f} | {row['anonymous']:,.0f} | {row['s']:.0f} | {num_files[way]} |"
        )
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _last_line(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
