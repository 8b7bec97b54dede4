"""The 8-bit embedding and head: exact against their dequantized weight, and never there as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lit_lora import LoRAConfig, LoRALightningModule, QuantizationConfig, inject_lora
from lit_lora.base.quantize import dequantize_, quantize_
from lit_lora.data.batches.packing import collate_packed
from lit_lora.data.prepared.dataset import TokenizedExample
from tests.large_tensors import LargeTensors
from tests.tiny import examples, language_model

IDS = torch.arange(3, 24).view(3, 7)


def _quantized(quantization: QuantizationConfig, **sizes: Any) -> Any:
    model = language_model(**{"hidden_size": 64, **sizes})
    quantize_(model, quantization)
    return model


def _batch() -> Any:
    return collate_packed(
        [
            TokenizedExample(i, torch.tensor(ids).numpy(), torch.tensor(mask).numpy())
            for i, (ids, mask) in enumerate(examples())
        ]
    )


def test_an_8_bit_embedding_is_never_there_as_a_whole():
    model = _quantized(QuantizationConfig(embedding_bits=8), vocab_size=20000, tie_word_embeddings=True)
    module = LoRALightningModule("tiny", lora=LoRAConfig(r=2))
    module.load_base = lambda: model  # type: ignore[method-assign]
    module.configure_model()
    assert module.path is not None
    assert module.path.direct_head
    with LargeTensors(20000 * 64 * 4) as tracked:
        module.compute_loss(_batch()).loss_sum.backward()
    assert tracked.num_made == 0


@pytest.mark.parametrize("accuracy", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_through_an_8_bit_head_equals_that_of_its_dequantized_weight(tied, accuracy, monkeypatch):
    monkeypatch.setattr("lit_lora.base.int8_rows.BLOCK", 50)  # several blocks, the last a short one
    quantized = _quantized(QuantizationConfig(embedding_bits=8), tie_word_embeddings=tied)
    plain = copy.deepcopy(quantized)
    dequantize_(plain)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is tied
    results = []
    for model in (quantized, plain):
        module = LoRALightningModule("tiny", lora=LoRAConfig(r=4))
        module.load_base = lambda m=model: m  # type: ignore[method-assign]
        torch.manual_seed(0)
        module.configure_model()
        output = module.compute_loss(_batch(), accuracy=accuracy)
        output.loss_sum.backward()
        results.append((output, {n: p.grad for n, p in module.trainable_parameters().items()}))
    (got, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(got.loss_sum, expected.loss_sum, rtol=1e-5, atol=1e-5)
    assert got.num_correct == expected.num_correct
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-4, atol=2e-5)


def test_8_bit_rows_are_close_and_a_row_of_zeros_stays_zero():
    model = language_model(tie_word_embeddings=True, hidden_size=64)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = 0
    before = model.model.embed_tokens.weight.detach().clone()
    quantize_(model, QuantizationConfig(embedding_bits=8))
    after = torch.cat(list(model.lm_head.blocks(torch.float32)))
    assert ((after - before).abs() <= before.abs().amax(1, keepdim=True) / 254 + 1e-7).all()
    assert not after[5].any()
    ids = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("kind", ["Gemma3Text", "Qwen2"])
def test_an_embedding_that_cannot_be_quantized_is_named(kind):
    model = language_model(kind, hidden_size=64)
    if kind == "Qwen2":
        model.lm_head.bias = nn.Parameter(torch.zeros(128))
    with pytest.raises(ValueError, match=r"embedding_bits: the (embedding|output head).*leave embedding_bits out"):
        quantize_(model, QuantizationConfig(embedding_bits=8))


@pytest.mark.parametrize("entry", ["lm_head", "embed_tokens"])
def test_an_8_bit_embedding_can_neither_be_trained_nor_adapted(entry):
    model = _quantized(QuantizationConfig(embedding_bits=8))
    with pytest.raises(ValueError, match=f"'{entry}' is quantized and cannot be trained in full"):
        inject_lora(model, LoRAConfig(target_modules=["q_proj"], modules_to_save=[entry]))
    with pytest.raises(ValueError, match=rf"{entry} of type Int8\w+, which cannot be adapted"):
        inject_lora(model, LoRAConfig(target_modules=["q_proj", entry]))
