"""``lit-lora generate``: prompt in, text out, with and without an adapter."""

from __future__ import annotations

import sys

from lit_lora.config import QuantizationConfig


def generate(
    prompt: str,
    base: str | None = None,
    adapter: str | None = None,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    system: str | None = None,
    compare: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: bool = True,
    trust_remote_code: bool = False,
) -> None:
    """Answer one prompt through the model's chat template.

    Args:
        prompt: the user's message; "-" reads it from standard input.
        base: base model, as in --model.base; by default the one that the adapter names.
        adapter: folder of an adapter in PEFT's format.
        quantization: how to quantize the base, such as --quantization.bits 4; by default as the adapter was trained.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        system: system message before the prompt.
        compare: show the answer without the adapter first.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 for the most likely token each time; above 0 to sample.
        top_p: sample from the smallest set of tokens of this total probability.
        seed: for sampling.
        stream: print tokens as they come.
        trust_remote_code: run code that comes with the base.
    """
    if compare and adapter is None:
        raise ValueError("--compare shows the answer with and without an adapter: give --adapter too")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
    if temperature == 0 and (top_p != 1.0 or seed is not None):
        raise ValueError("top_p and seed have no effect at temperature 0: set --temperature, or leave them out")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty")

    import torch
    from transformers import TextStreamer

    from lit_lora.adapters.merge import disable_lora
    from lit_lora.data.tokenize import format_prompt
    from lit_lora.tools.inference import load_for_inference

    model, tokenizer = load_for_inference(
        base,
        adapter,
        quantization=quantization,
        full_precision=full_precision,
        trust_remote_code=trust_remote_code,
    )
    messages = [{"role": "system", "content": system}] if system else []
    prompt_ids = torch.tensor([format_prompt(tokenizer, [*messages, {"role": "user", "content": text}])])
    prompt_ids = prompt_ids.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}

    def answer() -> None:
        if seed is not None:
            torch.manual_seed(seed)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
        output = model.generate(  # type: ignore[operator]
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **sampling,
        )
        if not stream:
            print(tokenizer.decode(output[0, prompt_ids.shape[1] :], skip_special_tokens=True))

    if compare:
        print("--- without the adapter")
        with disable_lora(model):
            answer()
        print("--- with the adapter")
    answer()
