"""Packed and direct paths against the model's own forward, architecture by architecture."""

import pytest
import torch
from torch.nn import functional as F

from lit_lora import LoRAConfig, inject_lora
from lit_lora.data.batches.packing import collate_packed, collate_padded
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.language_model.forward import ForwardPath, language_model_loss, unpack, with_targets
from lit_lora.language_model.trial import choose_path
from lit_lora.rewrites.recompute import checkpoint_layers
from tests.tiny import examples, language_model

# kind, fields, packed, direct head
ARCHITECTURES = [
    ("Llama", {}, True, True),
    ("Llama", {"tie_word_embeddings": True}, True, True),
    ("Mistral", {"sliding_window": 4}, True, True),
    ("Qwen2", {}, True, True),
    ("Gemma2", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}, True, False),
    ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, True, True),
    ("Phi3", {"pad_token_id": 0}, True, True),
    ("Granite", {"logits_scaling": 4.0}, True, False),
    ("Bloom", {"n_layer": 2, "n_head": 4}, False, True),
]


def _reference_loss(model, batch):
    """Each example alone through the model's own forward."""
    total = 0.0
    for ids, mask in batch:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        labels = torch.tensor([token if keep else -100 for token, keep in zip(ids, mask, strict=True)])
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    return total


def _collated(collate, batch):
    made = [
        TokenizedExample(index, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
        for index, (ids, mask) in enumerate(batch)
    ]
    return collate(made)


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "fields", "packed", "direct"), ARCHITECTURES)
def test_path_is_chosen_by_trial_and_equals_the_models_own_forward(kind, fields, packed, direct):
    model = language_model(kind, **fields)
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    batch = examples()
    expected = _reference_loss(model, batch)
    expected_gradients = _gradients(model, expected)

    path = choose_path(model)

    assert (path.packed, path.direct_head) == (packed, direct), str(path)
    loss = language_model_loss(model, _collated(collate_packed, batch), path).nll_sum
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = _gradients(model, loss)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_every_combination_gives_the_same_loss_and_accuracy(packed, direct, collate):
    model = language_model()
    batch = examples()
    expected = _reference_loss(model, batch)
    path = choose_path(model, packing=packed, direct_head=direct)
    assert (path.packed, path.direct_head) == (packed, direct)
    out = language_model_loss(model, _collated(collate, batch), path, accuracy=True)
    torch.testing.assert_close(out.nll_sum, expected, rtol=1e-5, atol=1e-5)
    assert 0 <= out.num_correct <= sum(sum(mask) for _, mask in batch)


def test_packing_gives_the_same_under_gradient_checkpointing():
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    path = choose_path(model)
    batch = _collated(collate_packed, examples())
    model.train()
    plain = _gradients(model, language_model_loss(model, batch, path).nll_sum)
    assert checkpoint_layers(model) == 2
    checkpointed = _gradients(model, language_model_loss(model, batch, path).nll_sum)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-5)


def test_an_adapted_head_takes_the_models_own_logits():
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    expected = _reference_loss(model, examples())
    path = choose_path(model)
    assert not path.direct_head
    assert "LoRALinear" in path.reason
    loss = language_model_loss(model, _collated(collate_packed, examples()), path).nll_sum
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_generation_works_after_packed_attention_was_selected():
    model = language_model()
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert choose_path(model).packed
    assert torch.equal(model.generate(ids, **options), expected)


def test_batches_of_foreign_collators_are_understood():
    batch = with_targets(
        {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "labels": torch.tensor([[-100, 6, 7], [-100, 9, -100]])}
    )
    assert batch["target_positions"].tolist() == [0, 1, 3]
    assert batch["target_ids"].tolist() == [6, 7, 9]
    with pytest.raises(ValueError, match="labels"):
        with_targets({"input_ids": torch.zeros(1, 3)})


def test_unpacked_batch_equals_the_padded_collator():
    batch = examples()
    got, expected = unpack(_collated(collate_packed, batch)), _collated(collate_padded, batch)
    for key in ("input_ids", "attention_mask", "target_positions", "target_ids"):
        assert torch.equal(
            got[key] * got["attention_mask"] if key == "input_ids" else got[key],
            expected[key] * expected["attention_mask"] if key == "input_ids" else expected[key],
        ), key


def test_path_says_why():
    assert str(ForwardPath(True, True, "")) == "packed without padding; loss from hidden states, in chunks"
    assert "because" in str(ForwardPath(False, True, "because"))
