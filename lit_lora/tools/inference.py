"""Load a base with an adapter, generate, and measure the loss: what ``generate`` and ``evaluate`` share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_lora.adapters.peft_format import load_adapter
from lit_lora.causal_lm import language_model_loss
from lit_lora.config import QuantizationConfig
from lit_lora.data.dataset import TokenizedExample
from lit_lora.data.formats import Examples
from lit_lora.data.packing import collate_packed
from lit_lora.data.tokenize import encode_examples
from lit_lora.models import load_base_model, load_tokenizer
from lit_lora.tools.adapter_folder import base_of_adapter, default_quantization, warn_of_another_base
from lit_lora.trial import choose_path


def load_for_inference(
    base: str | None,
    adapter: str | None,
    *,
    quantization: QuantizationConfig | None = None,
    full_precision: bool = False,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, put an adapter on it if one is given, and load the tokenizer.

    Args:
        base: as in ``--model.base``; None for the base that the adapter names.
        adapter: folder in PEFT's format.
        quantization: how to quantize the base; None for as the adapter was trained.
        full_precision: leave the base unquantized whatever the adapter was trained on.
        dtype: of the base's weights.
        trust_remote_code: run code that comes with the base.

    Raises:
        ValueError: if neither tells the base, or the adapter's files cannot be read.
        FileNotFoundError: if the adapter folder has no ``adapter_config.json``.
    """
    if base is None:
        if adapter is None:
            raise ValueError("which model? Give --base, or --adapter whose config names its base")
        base = base_of_adapter(adapter)
    elif adapter is not None:
        warn_of_another_base(adapter, base)
    if full_precision and quantization is not None:
        raise ValueError("full_precision and quantization exclude each other: give one of them")
    if adapter is not None and quantization is None and not full_precision:
        quantization, source = default_quantization(adapter, base)
        if quantization is not None:
            print(
                f"the base is quantized to {quantization.bits} bits, as the adapter was trained ({source}); "
                "--full_precision leaves it as it is",
                file=sys.stderr,
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_base_model(
        base, dtype=dtype, quantization=quantization, device=device, trust_remote_code=trust_remote_code
    )
    if adapter is not None:
        load_adapter(model, adapter)
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    return model.eval(), tokenizer


@torch.no_grad()
def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy completions, in the order of the prompts.

    Args:
        model: in evaluation mode.
        tokenizer: decodes; special tokens are left out.
        prompts: token ids of each prompt.
        max_new_tokens: longest completion.
        batch_size: prompts at a time; those of similar length go together, padded on the left.
        progress: called with the number of prompts that are done.
    """
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in indices)
        ids = torch.full((len(indices), longest), pad_id, device=model.device)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            length = len(prompts[index])
            ids[row, longest - length :] = torch.tensor(prompts[index])
            mask[row, longest - length :] = 1
        output = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id
        )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            completions[index] = text
        if progress is not None:
            progress(start + len(indices))
    return completions


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    *,
    max_length: int,
    batch_size: int = 16,
) -> float:
    """Mean negative log-likelihood of the target tokens of all examples, in nats; as validation measures it.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        examples: conversations and texts.
        max_length: tokens of an example, the rest is cut off.
        batch_size: examples at a time.

    Raises:
        ValueError: if no target is left within ``max_length``.
    """
    encoded = encode_examples(tokenizer, examples.items, examples.problems, max_length=max_length)
    tokenized = [
        TokenizedExample(index, np.array(example.ids, np.int32), np.array(example.mask, np.bool_))
        for index, example in enumerate(encoded)
        if any(example.mask)
    ]
    if not tokenized:
        raise ValueError(f"none of the {len(encoded)} examples has a target token among its first {max_length}")
    path = choose_path(model)
    nll_sum, num_targets = 0.0, 0
    for start in range(0, len(tokenized), batch_size):
        batch: dict[str, Any] = {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in collate_packed(tokenized[start : start + batch_size]).items()
        }
        nll_sum += float(language_model_loss(model, batch, path).nll_sum)
        num_targets += batch["target_ids"].numel()
    return nll_sum / num_targets
