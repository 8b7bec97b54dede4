"""What ``generate`` asks of a model beside the tokens."""

from __future__ import annotations

import torch

from lit_lora import LoRAConfig, inject_lora
from lit_lora.base.byte_tokenizer import byte_tokenizer
from lit_lora.data.chats.turn_end import text_end
from lit_lora.language_model.generation import complete
from tests.tiny import language_model


def test_the_head_of_a_frozen_base_gets_its_rows_side_by_side():
    """torch multiplies a slice of a tensor by a frozen weight with a copy of the weight for each row."""
    model = language_model("Llama", vocab_size=260)
    inject_lora(model, LoRAConfig(r=2))
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    tokenizer = byte_tokenizer()
    prompts = [[5, 6, 7], [9, 8], [4]]
    complete(model.eval(), tokenizer, prompts, end=text_end(tokenizer), max_new_tokens=3)
    hook.remove()
    assert [tuple(x.shape[:2]) for x in seen] == [(3, 1)] * len(seen)
    assert all(x.is_contiguous() for x in seen)
    assert not model.lm_head._forward_pre_hooks


def test_adapters_compute_the_same_without_a_graph():
    model = language_model("Llama").to(torch.bfloat16)
    inject_lora(model, LoRAConfig(r=2, init_lora_weights=False))
    ids = torch.arange(12).view(2, 6)
    with_graph = model.eval()(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, with_graph)
