"""``--data.new_tokens``: added, trained, saved, and read back by this library, PEFT and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_lora
from lit_lora.data.new_tokens import NewTokens
from tests.chat_tokenizers import chat_tokenizer
from tests.started_runs import fit, make_base, write_rows
from tests.started_runs import lit_lora as command

pytestmark = [
    # Lightning 2.6 calls jsonargparse in ways that jsonargparse 4.53 deprecates.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]

NEW = ["<think>", "<tool>"]
ROWS = [{"prompt": f"say {what}", "completion": f"<think>{what}<tool>"} for what in ("one", "two", "six")]


def _run(folder: Path, *, max_steps: int = 8, run: str = "run", **options: Any) -> tuple[str, Path]:
    tied = options.pop("tied", True)
    base = str(folder / "base") if (folder / "base").exists() else make_base(folder / "base", tie_word_embeddings=tied)
    data = write_rows(folder / "rows.jsonl", ROWS)
    options = {"data__new_tokens": str(NEW), **options}
    return base, fit(base, data, folder / run, max_steps=max_steps, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_trained_saved_and_read_by_all(tied, tmp_path):
    base, adapter = _run(tmp_path, tied=tied, model__optimization__learning_rate=0.002)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    first = len(tokenizer) - 2
    assert tokenizer("<think>", add_special_tokens=False)["input_ids"] == [first]
    ours, theirs_tokenizer, _ = lit_lora.load(str(adapter))
    assert len(theirs_tokenizer) == len(tokenizer)
    ids = torch.tensor([tokenizer("say one<think>one<tool>")["input_ids"]])
    assert {first, first + 1} <= set(ids.flatten().tolist())
    expected = ours(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(plain, adapter)
    got = theirs(ids).logits
    # Where the embedding has more rows than the tokenizer tokens, only those of the tokenizer are anybody's.
    assert torch.allclose(got, expected[..., : got.shape[-1]], atol=1e-4)
    command("merge", adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(merged(ids).logits, expected, atol=1e-4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)
    assert merged.config.tie_word_embeddings == tied
    untrained = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    pieces = chat_tokenizer(None)("<think>", add_special_tokens=False)["input_ids"]
    start = untrained[pieces].mean(dim=0)
    row = ours.get_input_embeddings().weight[first]
    assert 0 < (row - start).norm() < start.norm()  # it began there, and moved


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    steady = {"model__optimization__lr_schedule": "constant", "model__optimization__warmup_ratio": 0.0}
    _, whole = _run(tmp_path, max_steps=6, **steady)
    _run(tmp_path, max_steps=3, run="two", **steady)
    _, resumed = _run(tmp_path, max_steps=6, run="two", ckpt_path="last", **steady)
    ids = torch.arange(20, 40)[None]
    again, once = (lit_lora.load(str(adapter)).model(ids).logits for adapter in (resumed, whole))
    assert torch.equal(again, once)


def test_a_checkpoint_is_exported_with_its_tokens(tmp_path):
    _, adapter = _run(tmp_path, max_steps=3)
    checkpoint = next((tmp_path / "run").rglob("*.ckpt"))
    command("export", checkpoint, tmp_path / "exported")
    ids = torch.arange(20, 40)[None]
    exported, written = lit_lora.load(str(tmp_path / "exported")), lit_lora.load(str(adapter))
    assert torch.allclose(exported.model(ids).logits, written.model(ids).logits, atol=1e-5)
    assert exported.tokenizer.get_vocab() == written.tokenizer.get_vocab()


def test_an_embedding_that_is_trained_in_full_has_the_new_rows(tmp_path):
    _, adapter = _run(tmp_path, model__lora__modules_to_save="[embed_tokens,lm_head]")
    model, tokenizer, _ = lit_lora.load(str(adapter))
    assert len(model.get_input_embeddings().weight) == len(tokenizer)
    ids = torch.tensor([tokenizer("say one<think>")["input_ids"]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(plain, adapter)
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|endoftext|>"], r"'<\|endoftext\|>' is in the vocabulary already.*trainable_token_indices \[256\]"),
        (["<a>", "<a>"], "names a token twice"),
        ([" "], "must be a list of texts"),
        ("<a>", "must be a list of texts"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        NewTokens(tokens).added_to(chat_tokenizer(None))


def test_what_peft_wrote_after_resizing_the_vocabulary_is_read_and_written_again(tmp_path):
    make_base(tmp_path / "base", tie_word_embeddings=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = theirs.config.vocab_size
    torch.manual_seed(3)
    theirs.resize_token_embeddings(before + 3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lit_lora.load_adapter(ours, tmp_path / "adapter")
    ids = torch.arange(before - 10, before + 3)[None]
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
    lit_lora.save_adapter(ours, tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(before + 3)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "again")
    assert torch.allclose(again(ids).logits, ours(ids).logits, atol=1e-5)


def test_a_base_gets_its_rows_back_where_an_adapter_cannot_be_read(tmp_path):
    make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rows = model.config.vocab_size
    larger = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    larger.resize_token_embeddings(rows + 2)
    config = lit_lora.LoRAConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[rows + 1])
    lit_lora.inject_lora(larger, config)
    lit_lora.save_adapter(larger, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text.replace('"r": 2', '"r": 3'))
    with pytest.raises(ValueError, match="shapes differ"):
        lit_lora.load_adapter(model, tmp_path / "adapter")
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == rows
    assert model.get_output_embeddings().weight.shape[0] == rows
