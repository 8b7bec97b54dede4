"""Batches of few shapes: what is added to them changes neither loss nor gradients."""

from __future__ import annotations

import pytest
import torch

from lit_lora import LoRAConfig, inject_lora
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.language_model.fixed_shape import FixedBatch, shape_for
from lit_lora.language_model.forward import language_model_loss
from lit_lora.language_model.trial import choose_path
from tests.tiny import examples, language_model

CPU = torch.device("cpu")


def _batch(lengths=(7, 12, 5), seed=0, weights=False):
    made = []
    for index, (ids, mask) in enumerate(examples(lengths, seed)):
        weight = torch.linspace(0.5, 1.5, len(ids)).numpy() if weights else None
        made.append(TokenizedExample(index, torch.tensor(ids).numpy(), torch.tensor(mask).numpy(), weight))
    return collate_packed(made)


def _for_a_cpu(batch):
    """With lengths in the place of offsets: on a CPU examples are gone through one by one."""
    lengths = [length for length in batch["cu_seq_lens"].diff().tolist() if length]
    offsets = batch["cu_seq_lens"][: len(lengths) + 1]
    return {name: value for name, value in batch.items() if name != "longest"} | {
        "seq_lens": lengths,
        "cu_seq_lens": offsets,
    }


def _result(model, batch, path):
    model.zero_grad()
    loss = language_model_loss(model, batch, path).nll_sum
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("kind", "fields"), [("Llama", {}), ("Mistral", {"sliding_window": 4}), ("Qwen2", {})])
def test_loss_and_gradients_are_those_of_the_batch(kind, fields, weights):
    model = language_model(kind, **fields)
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    path = choose_path(model)
    assert path.packed
    assert path.direct_head
    batch = _batch(weights=weights)
    loss, gradients = _result(model, batch, path)
    fixed = FixedBatch(shape_for(batch), CPU).filled(batch)
    assert fixed["input_ids"].numel() > batch["input_ids"].numel()
    assert len(fixed["target_ids"]) > len(batch["target_ids"])
    found, theirs = _result(model, _for_a_cpu(fixed), path)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    for mine, other in zip(theirs, gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_another_batch_leaves_nothing_of_the_one_before():
    first, second = _batch((30, 40, 20), weights=True), _batch((9, 3), seed=1)
    shape = shape_for(first)
    assert shape.tokens == shape_for(second).tokens == 128
    shape = shape._replace(targets=max(shape.targets, shape_for(second).targets))
    used, fresh = FixedBatch(shape, CPU), FixedBatch(shape, CPU)
    places = {name: x.data_ptr() for name, x in used.filled(first).items() if isinstance(x, torch.Tensor)}
    again, expected = used.filled(second), fresh.filled(second)
    for name, place in places.items():
        assert again[name].data_ptr() == place
        assert torch.equal(again[name], expected[name]), name


@pytest.mark.parametrize("num_tokens", [1, 2, 127, 128, 129, 1000, 1024, 1025, 2047, 2048, 3000, 8192, 8193, 100_000])
def test_a_shape_is_at_most_an_eighth_larger(num_tokens):
    batch = _batch((num_tokens,)) if num_tokens > 1 else {**_batch((2,)), "input_ids": torch.zeros(1, 1).long()}
    shape = shape_for(batch)
    assert num_tokens <= shape.tokens < num_tokens + max(128, num_tokens / 8)
    assert len(batch["target_ids"]) <= shape.targets <= shape.tokens
    assert shape.examples >= len(batch["cu_seq_lens"])


def test_natural_batches_have_few_shapes():
    shapes = {shape_for(_batch((200 + 37 * i % 500, 90 + 11 * i % 300, 300))).tokens for i in range(60)}
    assert len(shapes) <= 10


def test_an_attention_that_needs_the_lengths_says_so():
    model = language_model("Llama")
    inject_lora(model, LoRAConfig(r=4))
    batch = _batch()
    fixed = FixedBatch(shape_for(batch), CPU).filled(batch)
    with pytest.raises(ValueError, match="one by one"):
        language_model_loss(model, fixed, choose_path(model))
