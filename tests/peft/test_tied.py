"""``ensure_weight_tying``: embedding and head trained as one, in PEFT's files both ways."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_lora import LoRAConfig, inject_lora, load_adapter, merge_lora, save_adapter
from lit_lora.adapters.layers import adapter_modules
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:ensure_weight_tying=True but the model does not:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning"),
]

IDS = torch.arange(3, 24).view(3, 7)
CASES: dict[str, dict[str, Any]] = {
    "embedding in full": {"modules_to_save": ["embed_tokens"]},
    "head in full": {"modules_to_save": ["lm_head"]},
    "both in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": [5, 9]},
    "adapted embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "adapted head": {"target_modules": ["lm_head", "q_proj"]},
}
each_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def _base(tied: bool = True) -> Any:
    return language_model(tie_word_embeddings=tied)


def _assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


@each_case
@pytest.mark.parametrize("tied", [True, False])
def test_what_peft_writes_is_read_and_written_again(fields, tied, tmp_path):
    torch.manual_seed(4)
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], **fields}, ensure_weight_tying=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(_base(tied), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = _base(tied)
    load_adapter(ours, tmp_path / "theirs")
    _assert_equal(ours(IDS).logits, theirs(input_ids=IDS).logits)
    save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(_base(tied), tmp_path / "ours")
    _assert_equal(again(input_ids=IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("name", ["embedding in full", "head in full", "both in full"])
def test_they_are_trained_as_one_and_stay_tied_when_merged(name, tmp_path):
    ours = _base()
    inject_lora(ours, LoRAConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True, **CASES[name]))
    theirs = peft.get_peft_model(
        _base(), peft.LoraConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True, **CASES[name])
    )
    for model in (ours, theirs):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
    got = {n: p for n, p in ours.named_parameters() if "lora" not in n and p.requires_grad}
    (expected,) = (p.grad for n, p in theirs.named_parameters() if "lora" not in n and p.requires_grad)
    assert list(got) == ["model.embed_tokens.copy.weight"]
    _assert_equal(got["model.embed_tokens.copy.weight"].grad, expected)
    with torch.no_grad():
        got["model.embed_tokens.copy.weight"].add_(1)
    before = ours(IDS).logits
    merge_lora(ours)
    assert ours.get_input_embeddings().weight is ours.get_output_embeddings().weight
    assert ours.config.tie_word_embeddings
    ours.save_pretrained(tmp_path)
    _assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, before)


@pytest.mark.parametrize(
    ("tied", "fields", "message"),
    [
        (False, {"modules_to_save": ["embed_tokens"]}, "has no effect: the model ties no head"),
        (True, {}, "has no effect: neither is trained in full"),
        (True, {"target_modules": ["embed_tokens"]}, "model.embed_tokens is adapted, and two adapters of one weight"),
    ],
)
def test_a_tie_that_is_none_is_refused(tied, fields, message):
    model = _base(tied)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}, ensure_weight_tying=True))
    assert not list(adapter_modules(model))
