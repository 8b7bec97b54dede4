"""A beginning that all examples share is computed once, and nothing else changes."""

import dataclasses

import pytest
import torch

from lit_lora import LoRAConfig, inject_lora
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from lit_lora.kernels import products
from lit_lora.language_model.forward import language_model_loss
from lit_lora.language_model.shared_prefix import share_prefix
from lit_lora.language_model.trial import choose_path
from lit_lora.rewrites.recompute import checkpoint_layers
from tests.tiny import language_model

PREFIX = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def _batch(*rests, prefix=PREFIX, first_target=None):
    made = []
    for index, rest in enumerate(rests):
        ids = [*prefix, *rest]
        start = len(prefix) + 1 if first_target is None else first_target
        made.append(TokenizedExample(index, torch.tensor(ids).numpy(), (torch.arange(len(ids)) >= start).numpy()))
    return collate_packed(made)


THREE = ([7, 8, 9, 10], [11, 12], [13, 14, 15, 16, 17])


def test_rows_of_the_beginning_are_there_once():
    batch = _batch(*THREE)
    shared = share_prefix(batch)
    assert shared["shared_prefix"] == 10
    assert shared["input_ids"].tolist() == [[*PREFIX, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]
    assert shared["position_ids"].tolist() == [[*range(10), *range(10, 14), *range(10, 12), *range(10, 15)]]
    assert shared["seq_lens"] == [10, 4, 2, 5]
    assert shared["cu_seq_lens"].tolist() == [0, 10, 14, 16, 21]
    ids = shared["input_ids"][0]
    assert ids[shared["target_positions"]].tolist() == [7, 8, 9, 11, 13, 14, 15, 16]
    assert torch.equal(ids[shared["target_positions"] + 1], shared["target_ids"])
    assert shared["num_tokens"] == batch["num_tokens"], "real tokens stay what they were"


@pytest.mark.parametrize(
    "batch",
    [
        _batch(THREE[0]),
        _batch(*THREE, prefix=[]),
        _batch(*THREE, prefix=PREFIX[:7]),  # saves 14 rows
        _batch(*THREE, first_target=2),
    ],
    ids=["one example", "nothing in common", "too little", "targets in the beginning"],
)
def test_other_batches_stay_as_they_are(batch):
    assert share_prefix(batch) is batch


def test_the_beginning_ends_where_an_example_differs_or_its_targets_begin():
    differs = _batch(*(rest for rest in THREE), prefix=PREFIX)
    differs["input_ids"][0, 14 + 8] += 1  # ninth token of the second example
    assert share_prefix(differs)["shared_prefix"] == 8
    assert share_prefix(_batch(*THREE, first_target=9))["shared_prefix"] == 8


@pytest.mark.parametrize(
    ("kind", "fields", "shared"),
    [
        ("Llama", {}, True),
        ("Qwen2", {}, True),
        ("Mistral", {"sliding_window": 4}, True),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, False),  # dropout of its own
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, True),
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_stay_what_they_were(kind, fields, shared, checkpointed):
    model = language_model(kind, **fields)
    inject_lora(model, LoRAConfig(r=4, init_lora_weights=False))
    path = choose_path(model)
    assert path.shared_prefix == shared
    assert ("shared beginnings computed once" in str(path)) == shared
    model.train()
    if not shared:
        return
    if checkpointed:
        checkpoint_layers(model)
    results = []
    for chosen in (path, dataclasses.replace(path, shared_prefix=False)):
        model.zero_grad()
        out = language_model_loss(model, _batch(*THREE), chosen, accuracy=True)
        out.nll_sum.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((out, gradients))
    (out, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(out.nll_sum, expected.nll_sum, rtol=1e-5, atol=1e-5)
    assert out.num_correct == expected.num_correct
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("onednn", [False, True])
def test_with_a_long_example_it_has_to_save_a_tenth_where_products_are_slow(monkeypatch, onednn):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: onednn)
    long = [*range(5, 105)] * 8
    assert ("shared_prefix" in share_prefix(_batch(long, THREE[0], THREE[1]))) == onednn  # 20 of 836 rows
    assert share_prefix(_batch(long, *[THREE[0]] * 12))["shared_prefix"] == 10  # 120 of 978


def test_dropout_of_the_adapters_gives_each_example_its_own():
    model = language_model()
    inject_lora(model, LoRAConfig(r=4, lora_dropout=0.1))
    path = choose_path(model)
    assert not path.shared_prefix
    assert "each example has dropout of its own" in path.reason


def test_it_can_be_switched_off():
    path = choose_path(language_model(), shared_prefix=False)
    assert path.packed
    assert not path.shared_prefix
    assert not path.reason
