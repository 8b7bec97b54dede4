"""What PEFT's files can hold beside tensors that fit: leftovers, overlaps, gaps, added tokens. PEFT is the oracle."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import safetensors.torch
import torch

from lit_lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_lora.adapters.layers import lora_layers
from tests.tiny import language_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
IDS = torch.arange(3, 24).view(3, 7)


def _assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def _edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _readers(folder: Path) -> list[Any]:
    """The adapter as PEFT and as we read it."""
    ours = language_model()
    load_adapter(ours, folder)
    return [peft.PeftModel.from_pretrained(language_model(), folder), ours]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["q_proj", "embed_tokens", "lm_head"]], ids=str)
def test_a_resized_vocabulary_is_loaded_by_doing_what_the_errors_say(targets, tied, tmp_path):
    fields = {"tie_word_embeddings": tied}
    base = language_model(**fields)
    base.resize_token_embeddings(140, mean_resizing=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    model = language_model(**fields)
    with pytest.raises(
        ValueError, match=r"the tokens that were added are in this file alone.*give its folder"
    ) as caught:
        load_adapter(model, tmp_path)
    assert model.get_input_embeddings().weight.shape[0] == 128, "refused, and changed"
    told = re.search(r"load again: (model\..*)\. For the command line", str(caught.value))
    assert told is not None
    exec(told[1], {"model": model, "safetensors": safetensors})
    load_adapter(model, tmp_path)
    ids = torch.arange(125, 139).view(2, 7)
    assert ids.max() > 130
    # PEFT writes nothing of a head that is neither tied nor adapted, so that its new rows are lost.
    known = 140 if tied or "lm_head" in targets else 128
    _assert_equal(model(ids).logits[..., :known], theirs(ids).logits[..., :known])


def test_a_resized_vocabulary_on_another_base_is_no_vocabulary(tmp_path):
    base = language_model(seed=1)
    base.resize_token_embeddings(140, mean_resizing=False)
    peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    model = language_model()
    model.resize_token_embeddings(140, mean_resizing=False)
    with pytest.raises(
        ValueError, match=r"embed_tokens.base_layer.weight, which differs.*trained on another base model"
    ):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"corda_config": {"corda_method": "ipm"}},
        {"eva_config": {"rho": 2.0}},
        {"lora_ga_config": {"direction": "ArB2r"}},
        {"loftq_config": {"loftq_bits": 4}},
        {"init_lora_weights": "mica"},
        {"lora_alpha": 0},
        {"lora_alpha": -6},
        {"alpha_pattern": {"q_proj": 0}},
        # Patterns that overlap: the first one counts, in the order of the file.
        {"alpha_pattern": {"q_proj": 3, r".*\.1\..*": 5}},
        {"alpha_pattern": {r".*\.1\..*": 5, "q_proj": 3}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`(eva|corda|lora_ga|loftq)_config` specified but will be ignored")
def test_what_peft_makes_of_a_configuration_is_made_here_too(changes, tmp_path):
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(language_model(), config).save_pretrained(tmp_path)
    _edited(tmp_path, **changes)
    theirs = peft.PeftModel.from_pretrained(language_model(), tmp_path)
    ours = language_model()
    load_adapter(ours, tmp_path)
    expected = theirs(IDS).logits
    _assert_equal(ours(IDS).logits, expected)
    save_adapter(ours, tmp_path / "again")
    for reader in _readers(tmp_path / "again"):
        _assert_equal(reader(IDS).logits, expected)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_targets_that_peft_chose_by_itself_are_those_in_the_file(saved, tmp_path):
    """PEFT has targets of its own for some architectures; the tensors say which they were."""
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", modules_to_save=saved)
    theirs = peft.get_peft_model(language_model(), config, autocast_adapter_dtype=False)
    theirs.save_pretrained(tmp_path)
    _edited(tmp_path, target_modules=None)
    expected = peft.PeftModel.from_pretrained(language_model(), tmp_path)(IDS).logits
    ours = language_model()
    assert len(load_adapter(ours, tmp_path).adapted) == 4
    _assert_equal(ours(IDS).logits, expected)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_overlapping_patterns_are_trained_as_peft_does_and_written_so_that_they_are_read_alike(field, tmp_path):
    """In memory the first pattern counts, in their own order; in a file they are sorted."""
    patterns = {"q_proj": 2, r"model\.layers\.0\..*": 3, ".*v_proj": 5}
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], field: patterns, "init_lora_weights": False}
    theirs = peft.get_peft_model(language_model(), peft.LoraConfig(**fields))
    ours = language_model()
    inject_lora(ours, LoRAConfig(**fields))
    for name, layer in lora_layers(ours):
        other = theirs.get_submodule(f"base_model.model.{name}")
        assert (layer.r, layer.lora_alpha) == (
            other.r["default"],
            other.lora_alpha["default"] * (1 if field == "alpha_pattern" else 2),
        )
    save_adapter(ours, tmp_path)
    for reader in _readers(tmp_path):
        _assert_equal(reader(IDS).logits, ours(IDS).logits)
