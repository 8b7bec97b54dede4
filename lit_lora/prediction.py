"""What ``predict`` writes for a prompt: a greedy generation."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def answer(model: Any, tokenizer: Any, batch: dict[str, Any], *, max_new_tokens: int) -> dict[str, Any]:
    """Generate from one prompt, greedily.

    Args:
        model: has ``generate``, as transformers models do.
        tokenizer: the model's.
        batch: ``prompt_ids``, ``(1, L)``, and where there is one, ``reference``.
        max_new_tokens: longest generation, in tokens.

    Returns:
        ``prompt``, ``completion``, ``reference``.
    """
    prompt_ids = batch["prompt_ids"]
    output_ids = model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    prompt = tokenizer.decode(prompt_ids[0], skip_special_tokens=True)
    completion = tokenizer.decode(output_ids[0, prompt_ids.shape[1] :], skip_special_tokens=True)
    return {"prompt": prompt, "completion": completion, "reference": batch.get("reference")}
