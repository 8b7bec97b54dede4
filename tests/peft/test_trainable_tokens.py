"""Single rows of embeddings and heads: PEFT's ``trainable_token_indices``, tied and untied."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lit_lora import LoRAConfig, disable_lora, inject_lora, load_adapter, merge_lora, save_adapter, unmerge_lora
from lit_lora.adapters.layers import adapter_modules
from lit_lora.interchange.peft_format import adapter_state_dict
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

IDS = torch.arange(3, 24).view(3, 7)
TOKENS = [20, 5, 9]
TIED = {"tie_word_embeddings": True}
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "untied": ("Llama", {}, TOKENS),
    "tied": ("Llama", TIED, TOKENS),
    "tied, both named": ("Llama", TIED, {"embed_tokens": TOKENS, "lm_head": TOKENS}),
    "tied, other rows": ("Llama", TIED, {"embed_tokens": TOKENS, "lm_head": [5, 7]}),
    "untied, both": ("Llama", {}, {"embed_tokens": TOKENS, "lm_head": [5, 7]}),
    "head alone": ("Llama", {}, {"lm_head": [5, 7]}),
    "full name": ("Llama", {}, {"model.embed_tokens": [0, 6]}),  # 0 is the padding token, without a gradient
    "scaled embedding": ("Gemma3Text", {"head_dim": 8}, TOKENS),
    "GPT-2": ("GPT2", {"n_positions": 64, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, {"wte": TOKENS}),
}
each_case = pytest.mark.parametrize(("kind", "fields", "rows"), CASES.values(), ids=CASES)


def _targets(kind: str) -> list[str]:
    return ["c_attn"] if kind == "GPT2" else ["q_proj"]


def _peft_model(kind: str, fields: dict[str, Any], rows: Any) -> Any:
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=2, target_modules=_targets(kind), trainable_token_indices=rows, init_lora_weights=False,
        fan_in_fan_out=kind == "GPT2", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(language_model(kind, **fields), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tokens_delta" in name:
                parameter.add_(torch.randn_like(parameter))
    return model


def _assert_equal(got: torch.Tensor, expected: torch.Tensor, what: str = "logits") -> None:
    assert (got - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), what


@each_case
def test_values_gradients_tensors_and_merge_are_those_of_peft(kind, fields, rows, tmp_path):
    theirs = _peft_model(kind, fields, rows).train()
    theirs.save_pretrained(tmp_path)
    ours = language_model(kind, **fields)
    load_adapter(ours, tmp_path, trainable=True)
    expected = theirs(input_ids=IDS, labels=IDS)
    got = ours.train()(input_ids=IDS, labels=IDS)
    _assert_equal(got.logits, expected.logits)
    assert (language_model(kind, **fields)(IDS).logits - expected.logits).abs().max() > 1e-2
    expected.loss.backward()
    got.loss.backward()
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    gradients = {
        n.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert mine.keys() == gradients.keys() == adapter_state_dict(ours).keys()
    for key, gradient in gradients.items():
        _assert_equal(mine[key], gradient, key)
    save_adapter(ours, tmp_path / "ours")
    written, read = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "ours", tmp_path))
    assert written.keys() == read.keys()
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())
    again = peft.PeftModel.from_pretrained(language_model(kind, **fields), tmp_path / "ours")
    _assert_equal(again(input_ids=IDS).logits, ours.eval()(IDS).logits)
    before = ours(IDS).logits
    merge_lora(ours, unload=False)
    _assert_equal(ours(IDS).logits, before)
    unmerge_lora(ours)
    assert torch.equal(ours(IDS).logits, before)
    with disable_lora(ours):
        assert torch.equal(ours(IDS).logits, language_model(kind, **fields)(IDS).logits)
    merge_lora(ours)
    assert not list(adapter_modules(ours))
    _assert_equal(ours(IDS).logits, before)
    ours.save_pretrained(tmp_path / "merged")
    read_again = type(ours).from_pretrained(tmp_path / "merged")
    _assert_equal(read_again(IDS).logits, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable_token_indices": [500]}, r"has no rows \[500\], only 0 to 127. Call model.resize_token_embeddings"),
        (
            {"trainable_token_indices": {"embeddings": [1]}},
            "'embeddings' matches no module; embeddings are model.embed",
        ),
        ({"trainable_token_indices": {"norm": [1]}}, "model.norm is a LlamaRMSNorm"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "adapted or trained in full already"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "adapted or trained in full already"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(fields, message):
    model = language_model()
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}))
    assert not list(adapter_modules(model))
