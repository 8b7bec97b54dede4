"""How fast a model answers, with an adapter and without: lit_lora, transformers and PEFT in turn.

    python -m benchmarks.answers --data gsm8k.jsonl

Questions of the data in the chat template, answered greedily; every answer has ``--tokens`` tokens, whatever it would
have ended with. All on the same adapter, which is random, on a base of the same dtype, and in one process after a
round that is not counted. Peers get the prompts as one batch, padded on the left, those of PEFT with its defaults.
Writes ``results/answers.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.peers.train import RESULTS, machine
from lit_lora import LoRAConfig, inject_lora, load, load_base_model, load_tokenizer, save_adapter
from lit_lora.adapters.layers import lora_layers
from lit_lora.base.load import resolve_base
from lit_lora.data.chats.turn_end import TurnEnd
from lit_lora.data.prepared.prepare import SourceSettings, tokenize_source
from lit_lora.language_model.generation import complete

Answers = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL file of prompts and completions")
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--prompts", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the base")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        prompts = _prompts(args, Path(folder))
        ways = _ways(args, _adapter(args.base, Path(folder)))
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        expected: dict[str, Answers] = {}
        for number in range(args.rounds + 1):
            for name, answer in ways.items():
                started = time.perf_counter()
                answers = answer(prompts)
                elapsed_s = time.perf_counter() - started
                if expected.setdefault(name, answers) != answers:
                    raise SystemExit(f"{name}: other answers than before")
                if number:
                    speeds[name].append(len(prompts) * args.tokens / elapsed_s)
    lines = [
        "# Answers",
        "",
        f"`{' '.join(['python -m benchmarks.answers', *sys.argv[1:]])}`",
        "",
        f"{machine(torch.get_num_threads())}. {args.base} in {args.dtype}, {len(prompts)} prompts of "
        f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens, {args.tokens} new ones each. "
        f"Median of {args.rounds} rounds [lowest, highest].",
        "",
        "| | tokens/s | answers that begin as lit_lora's, 20 characters |",
        "|---|---|---|",
    ]
    for name, found in speeds.items():
        ours = expected[f"lit_lora, {name.split(', ')[1]}"]
        same = sum(a[:20] == b[:20] for a, b in zip(ours, expected[name], strict=True))
        row = f"{statistics.median(found):.0f} [{min(found):.0f}, {max(found):.0f}]"
        lines.append(f"| {name} | {row} | {same} of {len(prompts)} |")
    name = "answers.md" if args.dtype == "bfloat16" else f"answers_{args.dtype}.md"
    (RESULTS / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def _prompts(args: argparse.Namespace, folder: Path) -> list[list[int]]:
    """Token ids of each prompt."""
    settings = SourceSettings(max_length=8192, limit=args.prompts)
    rows = tokenize_source(args.data, load_tokenizer(args.base), settings, cache_dir=folder / "cache")
    return [row.ids[: row.mask.tolist().index(True)].tolist() for row in (rows[i] for i in range(len(rows)))]


def _adapter(base: str, folder: Path) -> Path:
    """A random one on all linear layers, small enough to leave the answers sensible."""
    torch.manual_seed(0)
    model = load_base_model(base, dtype="float32")
    inject_lora(model, LoRAConfig(r=8, lora_alpha=16))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.factors()[1], std=1e-3)
    save_adapter(model, folder / "adapter", base_model_name=base)
    return folder / "adapter"


def _ways(args: argparse.Namespace, adapter: Path) -> dict[str, Callable[[list[list[int]]], Answers]]:
    """What answers, by name."""
    folder, dtype, tokenizer = resolve_base(args.base)[0], getattr(torch, args.dtype), load_tokenizer(args.base)

    def of_lit_lora(adapter: str | None) -> Callable[[list[list[int]]], Answers]:
        model = load(adapter, base=args.base, dtype=args.dtype).model
        model.generation_config.eos_token_id = None

        def answer(prompts: list[list[int]]) -> Answers:
            found = complete(
                model,
                tokenizer,
                prompts,
                end=TurnEnd([], ()),
                max_new_tokens=args.tokens,
                batch_size=len(prompts),
            )
            return [completion.text for completion in found]

        return answer

    def of_transformers(model: torch.nn.Module) -> Callable[[list[list[int]]], Answers]:
        def answer(prompts: list[list[int]]) -> Answers:
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=args.tokens,
                min_new_tokens=args.tokens,
                pad_token_id=0,
            )
            assert output.shape[1] == longest + args.tokens
            return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)

        return answer

    def plain() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    return {
        "lit_lora, the base": of_lit_lora(None),
        "transformers, the base": of_transformers(plain()),
        "lit_lora, adapter": of_lit_lora(str(adapter)),
        "PEFT, adapter": of_transformers(PeftModel.from_pretrained(plain(), adapter).eval()),
    }


if __name__ == "__main__":
    main()
