"""``lit-lora generate``: prompts in, text out, with and without adapters."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Literal

from lit_lora.config import QuantizationConfig

if TYPE_CHECKING:
    from lit_lora.evaluation.load import Loaded
    from lit_lora.evaluation.requests import Request


def generate(
    prompt: str,
    base: str | None = None,
    adapter: list[str] | str | None = None,
    revision: str | None = None,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
    format: Literal["auto", "chat", "text"] = "auto",
    system: str | None = None,
    compare: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: bool = True,
    batch_size: int | None = None,
    output: str | None = None,
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Answer a prompt, as the adapter was trained: through the chat template, or by continuing plain text.

    Several adapters answer one after the other. Of a file of prompts each row may name its adapter, and the answers are
    lines of JSON.

    Args:
        prompt: the user's message, or the beginning of a text; "-" reads it from standard input. Or a file of prompts,
            such as prompts.jsonl, with "prompt" or "messages" in each row and, where there are several, "adapter".
        base: base model, as in --model.base; by default the one that the adapter names.
        adapter: folder of an adapter in PEFT's format, or NAME=FOLDER; can be given several times.
        revision: branch, tag or commit of the base on the Hub; by default the one that the adapter names.
        quantization: how to quantize the base, such as --quantization.bits 4; by default as the adapter was trained.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: dtype of the base's weights; by default as the adapter was trained, and auto without an adapter.
        tokenizer: name or folder of another tokenizer than that of the adapter, or of the base without one.
        format: chat writes the prompt into the chat template, text continues it; auto does as the adapter was trained.
        system: system message before the prompt.
        compare: show the answer without the adapter first.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for the most likely token each time; above 0 to sample.
        top_p: sample from the smallest set of tokens of this total probability.
        seed: seed for sampling.
        stream: print tokens as they come.
        batch_size: prompts of a file at a time; by default 25, on a CPU what 16,384 tokens hold.
        output: file to write the answers to a file of prompts to; by default they are printed.
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    if compare and adapter is None:
        raise ValueError("--compare shows the answer with and without an adapter: give --adapter too")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty")

    from lit_lora.evaluation.generate import check_sampling
    from lit_lora.evaluation.load import load
    from lit_lora.evaluation.requests import read_requests, request_file
    from lit_lora.interchange.adapter_naming import named_folders
    from lit_lora.runs.said import readable

    check_sampling(temperature, top_p, seed, max_new_tokens)
    adapters = [adapter] if isinstance(adapter, str) else adapter
    names = [] if adapters is None else list(named_folders(adapters))
    file = request_file(prompt)
    _check_of_file(
        file is not None, {"batch_size": batch_size, "output": output}, {"compare": compare or None, "system": system}
    )
    requests = [] if file is None else read_requests(file, names)
    with readable():
        loaded = load(
            adapters,
            base=base,
            revision=revision,
            quantization=quantization,
            full_precision=full_precision,
            dtype=dtype,
            tokenizer=tokenizer,
            other_base=other_base,
            trust_remote_code=trust_remote_code,
        )
    how = {
        "format": format,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    if requests:
        _answer_file(loaded, requests, output, batch_size=batch_size, **how)
    else:
        _answer(loaded, text, system, compare=compare, stream=stream, **how)


def _check_of_file(is_file: bool, of_file: dict[str, Any], of_one: dict[str, Any]) -> None:
    for name, value in {**of_file, **of_one}.items():
        if value is not None and is_file != (name in of_file):
            raise ValueError(
                f"--{name} is for one prompt: leave it out, rows of a file can say the same (a system message in "
                "messages, null as adapter)"
                if is_file
                else f"--{name} is for a file of prompts, such as prompts.jsonl: leave it out"
            )
    if of_file["batch_size"] is not None and of_file["batch_size"] < 1:
        raise ValueError(f"batch_size must be at least 1, got {of_file['batch_size']}")


def _answer(loaded: Loaded, text: str, system: str | None, *, compare: bool, stream: bool, **how: Any) -> None:
    """Print the answer of each adapter, and before them that of the base if it is to be compared."""
    from lit_lora.evaluation.generate import BASE, continues_text, generate
    from lit_lora.language_model.generation import cut_note

    plain = {name: continues_text(loaded.asked(name).trained_on, how["format"]) for name in loaded.adapters or [""]}
    if any(plain.values()) and system is not None:
        raise ValueError("--system has no place in plain text, which the adapter was trained on: --format chat has one")
    if any(plain.values()) and how["format"] == "auto":
        print("continuing the text, as the adapter was trained on plain text; --format chat answers", file=sys.stderr)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    first, several = next(iter(plain)), len(plain) > 1
    heads: dict[str, str] = {BASE: "without an adapter" if several else "without the adapter"} if compare else {}
    heads |= {name: name if several else "with the adapter" for name in loaded.adapters}
    for name in heads or [None]:
        if name is not None and len(heads) > 1:
            print(f"--- {heads[name]}")
        asked = text if plain[first if name in (None, BASE) else name] else messages
        completions = generate(loaded, asked, adapter_names=name, stream=stream, **how)
        if not stream:
            print(completions[0].text)
        if note := cut_note(completions, how["max_new_tokens"]):
            print(note, file=sys.stderr)


def _answer_file(loaded: Loaded, requests: list[Request], output: str | None, **how: Any) -> None:
    """Answer all rows, and write a line of JSON for each."""
    from lit_lora.cli.progress import Counting
    from lit_lora.evaluation.generate import generate
    from lit_lora.files.atomic import atomic_text
    from lit_lora.language_model.generation import cut_note

    names = [request.adapter for request in requests] if loaded.adapters else None
    with Counting() as progress:
        completions = generate(
            loaded,
            [request.prompt for request in requests],
            adapter_names=names,
            progress=lambda done: progress("answered", done, len(requests)),
            **how,
        )
    lines = [
        json.dumps(
            {"prompt": request.prompt, "adapter": request.adapter, "completion": answer.text, "cut": answer.cut},
            ensure_ascii=False,
        )
        for request, answer in zip(requests, completions, strict=True)
    ]
    if output is None:
        print("\n".join(lines))
    else:
        atomic_text(output, "".join(line + "\n" for line in lines))
    if note := cut_note(completions, how["max_new_tokens"]):
        print(note, file=sys.stderr)
