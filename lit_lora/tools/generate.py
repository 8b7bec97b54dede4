"""``lit-lora generate``: prompt in, text out, with and without an adapter."""

from __future__ import annotations

import sys
from typing import Literal

from lit_lora.config import QuantizationConfig


def generate(
    prompt: str,
    base: str | None = None,
    adapter: str | None = None,
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
    other_base: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Answer one prompt, as the adapter was trained: through the chat template, or by continuing plain text.

    Args:
        prompt: the user's message, or the beginning of a text; "-" reads it from standard input.
        base: base model, as in --model.base; by default the one that the adapter names.
        adapter: folder of an adapter in PEFT's format.
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
        other_base: put the adapter on a base although its weights are not those that it was trained on.
        trust_remote_code: run code that comes with the base.
    """
    if compare and adapter is None:
        raise ValueError("--compare shows the answer with and without an adapter: give --adapter too")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty")

    from lit_lora.adapters.merge import disable_lora
    from lit_lora.evaluation import generate as answers
    from lit_lora.evaluation.load import load
    from lit_lora.language_model.generation import cut_note
    from lit_lora.runs.said import readable

    answers.check_sampling(temperature, top_p, seed, max_new_tokens)
    with readable():
        loaded = load(
            adapter,
            base=base,
            revision=revision,
            quantization=quantization,
            full_precision=full_precision,
            dtype=dtype,
            tokenizer=tokenizer,
            other_base=other_base,
            trust_remote_code=trust_remote_code,
        )
    plain = answers.continues_text(loaded, format)
    if plain and system is not None:
        raise ValueError("--system has no place in plain text, which the adapter was trained on: --format chat has one")
    if plain and format == "auto":
        print("continuing the text, as the adapter was trained on plain text; --format chat answers", file=sys.stderr)
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})

    def answer() -> None:
        completions = answers.generate(
            loaded,
            text if plain else messages,
            format=format,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stream=stream,
        )
        if not stream:
            print(completions[0].text)
        if note := cut_note(completions, max_new_tokens):
            print(note, file=sys.stderr)

    if compare:
        print("--- without the adapter")
        with disable_lora(loaded.model):
            answer()
        print("--- with the adapter")
    answer()
